"""TLS 1.3 after the handshake: bytes of the application <-> records (RFC 8446, sections 4.6, 5, 6 and 7).

::

    | 23 | 3, 3 | length | content, its kind (1), zeros | tag |
      1     2       2                                     16
                          `------------ encrypted -------------, with a key of one direction and a counter

OpenSSL makes the handshake (`openssl`) and has the ciphers; what stands between the two is how records look.
In a process whose caches hold somebody else's data OpenSSL's own layer takes 2.3 to 4.3 microseconds for a
short record, of which its cipher is 0.8 to 2.2; a commit is a dozen of them.

A key protects a bounded number of records, then the writer takes the next one and says so (KeyUpdate). The
peer's new keys are taken as they come; tickets are passed over, for nobody resumes a session.

Not here: handshake, certificates (`openssl`), sockets (`channel`, `service.tls_protocol`).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

import hmac
from ssl import AlertDescription, SSLError, SSLZeroReturnError

cdef extern from * nogil:
    """
    #include "openssl_lookup.h"

    #define CIPHER_FUNCTIONS(X) \\
        X(void *, EVP_CIPHER_CTX_new, (void)) \\
        X(void, EVP_CIPHER_CTX_free, (void *context)) \\
        X(int, EVP_CipherInit_ex, (void *context, const void *cipher, void *engine, \\
            const unsigned char *key, const unsigned char *iv, int encrypts)) \\
        X(int, EVP_CipherUpdate, (void *context, unsigned char *out, int *out_size, \\
            const unsigned char *data, int size)) \\
        X(int, EVP_CipherFinal_ex, (void *context, unsigned char *out, int *out_size)) \\
        X(int, EVP_CIPHER_CTX_ctrl, (void *context, int command, int number, void *pointer)) \\
        X(const void *, EVP_aes_128_gcm, (void)) \\
        X(const void *, EVP_aes_256_gcm, (void)) \\
        X(const void *, EVP_chacha20_poly1305, (void))

    OPENSSL_FUNCTIONS(find_cipher_functions, CIPHER_FUNCTIONS)
    """
    const char* find_cipher_functions(const char* path)
    void* EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(void* context)
    int EVP_CipherInit_ex(
        void* context, const void* cipher, void* engine, const uint8_t* key, const uint8_t* iv, int encrypts
    )
    int EVP_CipherUpdate(void* context, uint8_t* out, int* out_size, const uint8_t* data, int size)
    int EVP_CipherFinal_ex(void* context, uint8_t* out, int* out_size)
    int EVP_CIPHER_CTX_ctrl(void* context, int command, int number, void* pointer)
    const void* EVP_aes_128_gcm()
    const void* EVP_aes_256_gcm()
    const void* EVP_chacha20_poly1305()

cdef enum:
    EVP_CTRL_AEAD_GET_TAG = 0x10  # of OpenSSL's headers; part of its ABI
    EVP_CTRL_AEAD_SET_TAG = 0x11
    SSL_ERROR_SSL = 1
    SSL_ERROR_ZERO_RETURN = 6

cdef enum:
    HEADER_SIZE = 5
    TAG_SIZE = 16
    CONTENT_SIZE_MAX = 1 << 14
    CIPHERTEXT_SIZE_MAX = CONTENT_SIZE_MAX + 256
    KIND_ALERT = 21
    KIND_HANDSHAKE = 22
    KIND_DATA = 23
    MESSAGE_TICKET = 4
    MESSAGE_KEY_UPDATE = 24
    MESSAGE_HEAD_SIZE = 4  # type 1, length 3
    MESSAGE_SIZE_MAX = 1 << 17  # a ticket's
    ALERT_WARNING = 1
    ALERT_FATAL = 2
    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    INTERNAL_ERROR = 80
    USER_CANCELED = 90
    SMALL_SIZE = CONTENT_SIZE_MAX + 4096  # has room on the stack
    WITHOUT_GIL_SIZE = 1 << 16
    KEPT_SIZE_MAX = 1 << 18  # of a buffer that is empty

RECORDS_PER_KEY = 1 << 24
"""AES-GCM is safe for 2**24.5 records of full size with one key (RFC 8446, 5.5)."""

SUITES = {0x1301: (16, "sha256"), 0x1302: (32, "sha384"), 0x1303: (32, "sha256")}
"""By number: how long a key is, and what it is derived with."""

ALERTS = {
    each.value: each.name.removeprefix("ALERT_DESCRIPTION_").lower().replace("_", " ")
    for each in AlertDescription
} | {109: "missing extension", 116: "certificate required", 120: "no application protocol"}


def expand_label(bytes secret, bytes label, int size, digest):
    """RFC 8446's HKDF-Expand-Label without context, of no more than the digest's size."""
    label = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
    return hmac.digest(secret, info + b"\x01", digest)[:size]


cdef bint has_ciphers = False


cdef const char* find_ciphers(const char* path):
    """NULL, or what this OpenSSL lacks."""
    global has_ciphers
    cdef const char* missed = find_cipher_functions(path)
    has_ciphers = missed == NULL
    return missed


cdef class TlsRecords:
    """One side's, from the traffic secrets of a handshake. One caller at a time; nothing here waits.

    `load_openssl` comes first. Raises ValueError for another suite. After an error nothing more is read or
    written, but `take_output` has the alert that tells the peer. After `records_per_key` records that we
    write comes the next key.
    """

    def __cinit__(
        self,
        int suite,
        *,
        bytes read_secret not None,
        bytes write_secret not None,
        bint is_client,
        size_t record_size_max=CONTENT_SIZE_MAX,
        uint64_t records_per_key=RECORDS_PER_KEY,
    ):
        if not has_ciphers or suite not in SUITES:
            raise ValueError(f"there is no suite {suite:#x} here")
        self.suite = suite
        self.read_secret = read_secret
        self.write_secret = write_secret
        self.is_client = is_client
        self.record_size_max = record_size_max
        self.records_per_key = records_per_key
        self.message = b""
        self.reading.cipher = EVP_CIPHER_CTX_new()
        self.writing.cipher = EVP_CIPHER_CTX_new()
        if self.reading.cipher == NULL or self.writing.cipher == NULL:
            raise MemoryError("no memory for the keys of a TLS connection")
        start_direction(&self.reading, suite, read_secret, False)
        start_direction(&self.writing, suite, write_secret, True)

    def __dealloc__(self):
        if self.reading.cipher != NULL:
            EVP_CIPHER_CTX_free(self.reading.cipher)
        if self.writing.cipher != NULL:
            EVP_CIPHER_CTX_free(self.writing.cipher)
        free(self.input.data)
        free(self.output.data)
        free(self.plain)

    def decrypt(self, bytes data not None):
        """What the peer wrote, as far as it has come with `data`. Raises ssl.SSLError; ssl.SSLZeroReturnError
        when the peer has ended TLS and nothing came before that. Then see `take_output`."""
        cdef ssize_t size
        cdef size_t most
        cdef uint8_t* buffer
        cdef uint8_t[SMALL_SIZE] small
        self.feed(<const uint8_t*> PyBytes_AS_STRING(data), len(data))
        most = self.input.end - self.input.begin + self.plain_end - self.plain_begin
        if most <= SMALL_SIZE:
            size = self.read_some(small, SMALL_SIZE)
            if size < 0:
                raise self.failure()
            return PyBytes_FromStringAndSize(<const char*> small, size)
        whole = PyBytes_FromStringAndSize(NULL, most)
        buffer = <uint8_t*> PyBytes_AS_STRING(whole)
        if most > WITHOUT_GIL_SIZE:
            with nogil:
                size = self.read_some(buffer, most)
        else:
            size = self.read_some(buffer, most)
        if size < 0:
            raise self.failure()
        return whole[:size]

    def encrypt(self, bytes data not None):
        """The bytes for the socket. Raises ssl.SSLError."""
        cdef bint is_written
        cdef size_t size = len(data)
        cdef const uint8_t* begin = <const uint8_t*> PyBytes_AS_STRING(data)
        if size > WITHOUT_GIL_SIZE:
            with nogil:
                is_written = self.write_all(begin, size)
        else:
            is_written = self.write_all(begin, size)
        if not is_written:
            raise self.failure()
        return self.take_output()

    def take_output(self):
        """Bytes for the socket that have not been taken yet: of the handshake, or of TLS itself."""
        cdef size_t size = self.output.end - self.output.begin
        if size == 0:
            return b""
        taken = PyBytes_FromStringAndSize(NULL, size)
        self.take_some_output(<uint8_t*> PyBytes_AS_STRING(taken), size)
        return taken

    def shutdown(self):
        """The bytes that tell the peer that nothing more comes."""
        cdef uint8_t[2] alert
        alert[0] = ALERT_WARNING
        alert[1] = CLOSE_NOTIFY
        if self.problem == NULL:
            self.seal(KIND_ALERT, alert, 2)
        return self.take_output()

    cdef void feed(self, const uint8_t* data, size_t size) noexcept nogil:
        """Bytes from the socket."""
        if self.problem == NULL and not put(&self.input, data, size):
            self.fail(INTERNAL_ERROR, "no memory for what has come")

    cdef bint has_input(self) noexcept nogil:
        """Whether `read_some` may find something without another `feed`."""
        return (
            self.plain_begin < self.plain_end
            or self.is_ended
            or self.whole_record() > 0
            or self.problem != NULL
        )

    cdef ssize_t read_some(self, uint8_t* buffer, size_t size) noexcept nogil:
        """As much as is here; 0: a record is not whole yet; -1: see `failure`."""
        cdef size_t done = 0
        cdef size_t part, length
        cdef ssize_t opened
        cdef uint8_t kind
        cdef uint8_t* target
        while done < size:
            part = min(self.plain_end - self.plain_begin, size - done)
            if part:
                memcpy(buffer + done, self.plain + self.plain_begin, part)
                self.plain_begin += part
                done += part
                continue
            length = 0 if self.is_ended else self.whole_record()
            if length == 0 or self.problem != NULL:
                break
            target = buffer + done
            if size - done < length:
                if self.plain == NULL:
                    self.plain = <uint8_t*> malloc(CIPHERTEXT_SIZE_MAX)
                if self.plain == NULL:
                    self.fail(INTERNAL_ERROR, "no memory for a record")
                    break
                target = self.plain
            opened = self.open_record(length, target, &kind)
            if opened < 0:
                break
            if kind != KIND_DATA:
                if not self.take_other(kind, target, opened):
                    break
            elif self.has_part:
                self.fail(UNEXPECTED_MESSAGE, "data within a message of the handshake")
                break
            elif target == self.plain:
                self.plain_begin = 0
                self.plain_end = opened
            else:
                done += opened
        if done == 0 and (self.is_ended or self.problem != NULL):
            return -1
        return done

    cdef bint write_all(self, const uint8_t* data, size_t size) noexcept nogil:
        cdef size_t done = 0
        cdef size_t part
        while done < size:
            if self.problem != NULL:
                return False
            if self.writing.sequence >= self.records_per_key and not self.renew_writing():
                return False
            part = min(size - done, self.record_size_max)
            if not self.seal(KIND_DATA, data + done, part):
                return False
            done += part
        return self.problem == NULL

    cdef void put_output(self, const uint8_t* data, size_t size) noexcept nogil:
        """Bytes for the socket before all others."""
        if not put(&self.output, data, size):
            self.problem = "no memory for what goes out"

    cdef size_t take_some_output(self, uint8_t* buffer, size_t size) noexcept nogil:
        """How many bytes for the socket have been put into `buffer`."""
        size = min(size, self.output.end - self.output.begin)
        memcpy(buffer, self.output.data + self.output.begin, size)
        take(&self.output, size)
        return size

    cdef object failure(self):
        """Why the last call failed."""
        if self.problem == NULL:
            return SSLZeroReturnError(SSL_ERROR_ZERO_RETURN, "the peer has ended TLS")
        reason = self.problem.decode()
        if self.alert:
            reason += f": {ALERTS.get(self.alert, 'unknown alert')} ({self.alert})"
        return SSLError(SSL_ERROR_SSL, reason)

    # Records

    cdef size_t whole_record(self) noexcept nogil:
        """How long the next record is behind its header; 0 when it has not come, or may not come."""
        cdef const uint8_t* header = self.input.data + self.input.begin
        cdef size_t size = self.input.end - self.input.begin
        cdef size_t length
        if size < HEADER_SIZE or self.problem != NULL:
            return 0
        length = <size_t> header[3] << 8 | header[4]
        if header[0] != KIND_DATA:
            self.fail(UNEXPECTED_MESSAGE, "a record that is not encrypted")
        elif length > CIPHERTEXT_SIZE_MAX:
            self.fail(RECORD_OVERFLOW, "a record is too long")
        elif length <= TAG_SIZE:
            self.fail(BAD_RECORD_MAC, "a record is too short: bad record mac")
        elif size >= HEADER_SIZE + length:
            return length
        return 0

    cdef ssize_t open_record(self, size_t length, uint8_t* target, uint8_t* kind) noexcept nogil:
        """How long the content of the next record is, which is in `target` then; -1 after an error. There is
        room for `length` bytes."""
        cdef uint8_t[IV_SIZE] nonce
        cdef uint8_t* record = self.input.data + self.input.begin
        cdef void* cipher = self.reading.cipher
        cdef size_t size = length - TAG_SIZE
        cdef int opened, rest
        put_nonce(&self.reading, nonce)
        if (
            EVP_CipherInit_ex(cipher, NULL, NULL, NULL, nonce, 0) != 1
            or EVP_CIPHER_CTX_ctrl(cipher, EVP_CTRL_AEAD_SET_TAG, TAG_SIZE, record + HEADER_SIZE + size) != 1
            or EVP_CipherUpdate(cipher, NULL, &opened, record, HEADER_SIZE) != 1
            or EVP_CipherUpdate(cipher, target, &opened, record + HEADER_SIZE, <int> size) != 1
            or EVP_CipherFinal_ex(cipher, target + size, &rest) != 1
        ):
            self.fail(BAD_RECORD_MAC, "bad record mac")
            return -1
        self.reading.sequence += 1
        take(&self.input, HEADER_SIZE + length)
        while size and target[size - 1] == 0:  # padding
            size -= 1
        if size == 0:
            self.fail(UNEXPECTED_MESSAGE, "a record of no kind")
            return -1
        kind[0] = target[size - 1]
        if size - 1 > CONTENT_SIZE_MAX:
            self.fail(RECORD_OVERFLOW, "a record's content is too long")
            return -1
        return size - 1

    cdef bint seal(self, uint8_t kind, const uint8_t* content, size_t size) noexcept nogil:
        """Puts a record into the output. False after an error."""
        cdef uint8_t[IV_SIZE] nonce
        cdef uint8_t* record
        cdef void* cipher = self.writing.cipher
        cdef size_t length = size + 1 + TAG_SIZE
        cdef int sealed, rest
        if not reserve(&self.output, HEADER_SIZE + length):
            self.problem = "no memory for what goes out"
            return False
        record = self.output.data + self.output.end
        record[0] = KIND_DATA
        record[1] = record[2] = 3
        record[3] = <uint8_t> (length >> 8)
        record[4] = <uint8_t> length
        memcpy(record + HEADER_SIZE, content, size)
        record[HEADER_SIZE + size] = kind
        put_nonce(&self.writing, nonce)
        self.writing.sequence += 1  # whatever comes of it: no nonce is used twice
        if (
            EVP_CipherInit_ex(cipher, NULL, NULL, NULL, nonce, 1) != 1
            or EVP_CipherUpdate(cipher, NULL, &sealed, record, HEADER_SIZE) != 1
            or EVP_CipherUpdate(
                cipher, record + HEADER_SIZE, &sealed, record + HEADER_SIZE, <int> (size + 1)
            ) != 1
            or EVP_CipherFinal_ex(cipher, record + HEADER_SIZE + size + 1, &rest) != 1
            or EVP_CIPHER_CTX_ctrl(
                cipher, EVP_CTRL_AEAD_GET_TAG, TAG_SIZE, record + HEADER_SIZE + size + 1
            ) != 1
        ):
            self.problem = "a record could not be encrypted"
            return False
        self.output.end += HEADER_SIZE + length
        return True

    cdef void fail(self, int alert, const char* problem) noexcept nogil:
        cdef uint8_t[2] content
        if self.problem != NULL:
            return
        content[0] = ALERT_FATAL
        content[1] = <uint8_t> alert
        self.seal(KIND_ALERT, content, 2)
        self.problem = problem

    # What is not the application's

    cdef bint take_other(self, uint8_t kind, const uint8_t* content, size_t size) noexcept with gil:
        """Whether there may be more after it."""
        if kind == KIND_ALERT and size == 2 and not self.has_part:
            if content[1] == CLOSE_NOTIFY:
                self.is_ended = True
            elif content[1] != USER_CANCELED:  # which close_notify follows
                self.alert = content[1]
                self.problem = "the peer gave up TLS"
            return content[1] == USER_CANCELED
        if kind != KIND_HANDSHAKE or size == 0:
            self.fail(UNEXPECTED_MESSAGE, "a record that may not come")
            return False
        message = self.message + content[:size]
        while len(message) >= MESSAGE_HEAD_SIZE and self.problem == NULL:
            end = MESSAGE_HEAD_SIZE + int.from_bytes(message[1:MESSAGE_HEAD_SIZE], "big")
            if len(message) < end:
                if end > MESSAGE_SIZE_MAX:
                    self.fail(UNEXPECTED_MESSAGE, "a message of the handshake is too long")
                break
            if message[0] == MESSAGE_KEY_UPDATE and len(message) > end:
                self.fail(UNEXPECTED_MESSAGE, "a message of the handshake after a new key")
                break
            try:
                self.take_message(message[:end])
            except (MemoryError, ValueError):
                self.fail(INTERNAL_ERROR, "no new key could be made")
            message = message[end:]
        self.message = message
        self.has_part = len(message) > 0
        return self.problem == NULL

    cdef int take_message(self, bytes message) except -1:
        if message[0] == MESSAGE_TICKET and self.is_client:
            return 0
        if message[0] != MESSAGE_KEY_UPDATE:
            self.fail(UNEXPECTED_MESSAGE, "a message of the handshake that may not come")
        elif len(message) != MESSAGE_HEAD_SIZE + 1:
            self.fail(DECODE_ERROR, "a message of a new key is not whole")
        elif message[MESSAGE_HEAD_SIZE] > 1:
            self.fail(ILLEGAL_PARAMETER, "a message of a new key asks for what there is not")
        else:
            self.read_secret = next_secret(self.suite, self.read_secret)
            start_direction(&self.reading, self.suite, self.read_secret, False)
            if message[MESSAGE_HEAD_SIZE]:
                self.renew_writing()
        return 0

    cdef bint renew_writing(self) noexcept with gil:
        """The next key, which is announced under the present one."""
        cdef bytes message = bytes([MESSAGE_KEY_UPDATE, 0, 0, 1, 0])
        if not self.seal(KIND_HANDSHAKE, <const uint8_t*> PyBytes_AS_STRING(message), len(message)):
            return False
        try:
            self.write_secret = next_secret(self.suite, self.write_secret)
            start_direction(&self.writing, self.suite, self.write_secret, True)
        except (MemoryError, ValueError):
            self.problem = "no new key could be made"
            return False
        return True


cdef next_secret(int suite, bytes secret):
    return expand_label(secret, b"traffic upd", len(secret), SUITES[suite][1])


cdef int start_direction(Direction* direction, int suite, bytes secret, bint encrypts) except -1:
    cdef const void* cipher
    cdef bytes key, iv
    size, digest = SUITES[suite]
    key = expand_label(secret, b"key", size, digest)
    iv = expand_label(secret, b"iv", IV_SIZE, digest)
    if suite == 0x1303:
        cipher = EVP_chacha20_poly1305()
    else:
        cipher = EVP_aes_256_gcm() if suite == 0x1302 else EVP_aes_128_gcm()
    if 1 != EVP_CipherInit_ex(
        direction.cipher, cipher, NULL, <const uint8_t*> PyBytes_AS_STRING(key), NULL, encrypts
    ):
        raise ValueError(f"OpenSSL does not take a key of suite {suite:#x}")
    memcpy(direction.iv, PyBytes_AS_STRING(iv), IV_SIZE)
    direction.sequence = 0
    return 0


cdef void put_nonce(const Direction* direction, uint8_t* nonce) noexcept nogil:
    cdef int index
    memcpy(nonce, direction.iv, IV_SIZE)
    for index in range(8):
        nonce[IV_SIZE - 1 - index] ^= <uint8_t> (direction.sequence >> (8 * index))


cdef bint reserve(Buffer* buffer, size_t size) noexcept nogil:
    """Room for so many bytes more. False without memory."""
    cdef size_t used = buffer.end - buffer.begin
    cdef uint8_t* data
    if buffer.capacity - buffer.end >= size:
        return True
    if used:
        memmove(buffer.data, buffer.data + buffer.begin, used)
    buffer.begin = 0
    buffer.end = used
    if buffer.capacity - used >= size:
        return True
    data = <uint8_t*> realloc(buffer.data, max(used + size, 2 * buffer.capacity))
    if data == NULL:
        return False
    buffer.data = data
    buffer.capacity = max(used + size, 2 * buffer.capacity)
    return True


cdef bint put(Buffer* buffer, const uint8_t* data, size_t size) noexcept nogil:
    if size == 0:
        return True
    if not reserve(buffer, size):
        return False
    memcpy(buffer.data + buffer.end, data, size)
    buffer.end += size
    return True


cdef void take(Buffer* buffer, size_t size) noexcept nogil:
    buffer.begin += size
    if buffer.begin < buffer.end:
        return
    buffer.begin = buffer.end = 0
    if buffer.capacity > KEPT_SIZE_MAX:
        free(buffer.data)
        buffer.data = NULL
        buffer.capacity = 0
