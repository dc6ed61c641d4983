"""TLS by the OpenSSL that Python's own `ssl` uses, called without the interpreter in between.

::

    bytes from the socket -> handshake ->  +-----+
    bytes for the socket  <- take_output <-| SSL |
                                           +-----+
                                              |  once: suite, traffic secrets, bytes behind the handshake
    bytes from the socket -> feed ->    +------------+  -> read_some -> bytes of the application
    bytes for the socket  <- output  <- | TlsRecords |  <- write_all <- bytes of the application
                                        +------------+

Python's `ssl` gives no native way to its connections, so contexts are made here anew, from the same files and
with the same checks: TLS 1.3, the chain up to the CA, and the name or address that was called. No header
of OpenSSL is needed to build this: its functions, which have been the same since 1.1.1, are looked up in the
library that `_ssl` has loaded. The traffic secrets come by the call that OpenSSL has for a log of keys.

Not here: records after the handshake (`tls_records`), sockets (`channel`, `service.tls_protocol`), when files
are loaded anew (`service.tls`).
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint16_t
from libc.string cimport strncmp, strrchr

import ipaddress
from ssl import SSLCertVerificationError, SSLError

from excimer._native.tls_records cimport TlsRecords, find_ciphers

from excimer._native.tls_records import RECORDS_PER_KEY

cdef extern from * nogil:
    """
    #include "openssl_lookup.h"

    #define HANDSHAKE_FUNCTIONS(X) \\
        X(const void *, TLS_client_method, (void)) \\
        X(const void *, TLS_server_method, (void)) \\
        X(void *, SSL_CTX_new, (const void *method)) \\
        X(void, SSL_CTX_free, (void *context)) \\
        X(long, SSL_CTX_ctrl, (void *context, int command, long number, void *pointer)) \\
        X(void, SSL_CTX_set_security_level, (void *context, int level)) \\
        X(int, SSL_CTX_set_num_tickets, (void *context, size_t count)) \\
        X(void, SSL_CTX_set_verify, (void *context, int mode, void *callback)) \\
        X(int, SSL_CTX_use_certificate_chain_file, (void *context, const char *path)) \\
        X(int, SSL_CTX_use_PrivateKey_file, (void *context, const char *path, int kind)) \\
        X(int, SSL_CTX_check_private_key, (const void *context)) \\
        X(int, SSL_CTX_load_verify_locations, (void *context, const char *file, const char *directory)) \\
        X(void, SSL_CTX_set_alpn_select_cb, (void *context, int (*choose)(void *, \\
            const unsigned char **, unsigned char *, const unsigned char *, unsigned, void *), void *)) \\
        X(int, SSL_select_next_proto, (unsigned char **chosen, unsigned char *size, \\
            const unsigned char *ours, unsigned ours_size, const unsigned char *theirs, unsigned)) \\
        X(void, SSL_CTX_set_keylog_callback, (void *context, void (*take)(const void *, const char *))) \\
        X(int, SSL_CTX_set_ciphersuites, (void *context, const char *suites)) \\
        X(int, SSL_set_ex_data, (void *ssl, int index, void *data)) \\
        X(void *, SSL_get_ex_data, (const void *ssl, int index)) \\
        X(const void *, SSL_get_current_cipher, (const void *ssl)) \\
        X(unsigned short, SSL_CIPHER_get_protocol_id, (const void *cipher)) \\
        X(const void *, SSL_get_session, (const void *ssl)) \\
        X(unsigned char, SSL_SESSION_get_max_fragment_length, (const void *session)) \\
        X(void, OPENSSL_cleanse, (void *data, size_t size)) \\
        X(void *, SSL_new, (void *context)) \\
        X(void, SSL_free, (void *ssl)) \\
        X(void, SSL_set_bio, (void *ssl, void *incoming, void *outgoing)) \\
        X(void, SSL_set_accept_state, (void *ssl)) \\
        X(void, SSL_set_connect_state, (void *ssl)) \\
        X(long, SSL_ctrl, (void *ssl, int command, long number, void *pointer)) \\
        X(int, SSL_set1_host, (void *ssl, const char *name)) \\
        X(void, SSL_set_hostflags, (void *ssl, unsigned flags)) \\
        X(void *, SSL_get0_param, (void *ssl)) \\
        X(int, X509_VERIFY_PARAM_set1_ip_asc, (void *parameters, const char *address)) \\
        X(int, SSL_do_handshake, (void *ssl)) \\
        X(int, SSL_get_error, (const void *ssl, int result)) \\
        X(long, SSL_get_verify_result, (const void *ssl)) \\
        X(const char *, X509_verify_cert_error_string, (long result)) \\
        X(const void *, BIO_s_mem, (void)) \\
        X(void *, BIO_new, (const void *method)) \\
        X(int, BIO_free, (void *bio)) \\
        X(int, BIO_write, (void *bio, const void *data, int size)) \\
        X(int, BIO_read, (void *bio, void *data, int size)) \\
        X(size_t, BIO_ctrl_pending, (void *bio)) \\
        X(void, ERR_clear_error, (void)) \\
        X(unsigned long, ERR_peek_last_error, (void)) \\
        X(const char *, ERR_reason_error_string, (unsigned long error))

    OPENSSL_FUNCTIONS(find_handshake_functions, HANDSHAKE_FUNCTIONS)

    /* As Python's set_alpn_protocols(["postgresql", "http/1.1"]). */
    static int choose_protocol(void *ssl, const unsigned char **chosen, unsigned char *size,
                               const unsigned char *offered, unsigned offered_size, void *unused) {
        static const unsigned char ours[] = {10, 'p', 'o', 's', 't', 'g', 'r', 'e', 's', 'q', 'l',
                                             8, 'h', 't', 't', 'p', '/', '1', '.', '1'};
        int outcome = SSL_select_next_proto((unsigned char **) chosen, size, ours, sizeof ours,
                                            offered, offered_size);
        return outcome == 1 /* OPENSSL_NPN_NEGOTIATED */ ? 0 : 3 /* SSL_TLSEXT_ERR_NOACK */;
    }

    static void choose_protocols(void *context) {
        SSL_CTX_set_alpn_select_cb(context, choose_protocol, NULL);
    }
    """
    const char* find_handshake_functions(const char* path)
    void choose_protocols(void* context)
    void SSL_CTX_set_keylog_callback(void* context, void (*take)(const void*, const char*) noexcept)
    int SSL_CTX_set_ciphersuites(void* context, const char* suites)
    int SSL_set_ex_data(void* ssl, int index, void* data)
    void* SSL_get_ex_data(const void* ssl, int index)
    const void* SSL_get_current_cipher(const void* ssl)
    uint16_t SSL_CIPHER_get_protocol_id(const void* cipher)
    const void* SSL_get_session(const void* ssl)
    uint8_t SSL_SESSION_get_max_fragment_length(const void* session)
    void OPENSSL_cleanse(void* data, size_t size)
    const void* TLS_client_method()
    const void* TLS_server_method()
    void* SSL_CTX_new(const void* method)
    void SSL_CTX_free(void* context)
    long SSL_CTX_ctrl(void* context, int command, long number, void* pointer)
    void SSL_CTX_set_security_level(void* context, int level)
    int SSL_CTX_set_num_tickets(void* context, size_t count)
    void SSL_CTX_set_verify(void* context, int mode, void* callback)
    int SSL_CTX_use_certificate_chain_file(void* context, const char* path)
    int SSL_CTX_use_PrivateKey_file(void* context, const char* path, int kind)
    int SSL_CTX_check_private_key(const void* context)
    int SSL_CTX_load_verify_locations(void* context, const char* file, const char* directory)
    void* SSL_new(void* context)
    void SSL_free(void* ssl)
    void SSL_set_bio(void* ssl, void* incoming, void* outgoing)
    void SSL_set_accept_state(void* ssl)
    void SSL_set_connect_state(void* ssl)
    long SSL_ctrl(void* ssl, int command, long number, void* pointer)
    int SSL_set1_host(void* ssl, const char* name)
    void SSL_set_hostflags(void* ssl, unsigned flags)
    void* SSL_get0_param(void* ssl)
    int X509_VERIFY_PARAM_set1_ip_asc(void* parameters, const char* address)
    int SSL_do_handshake(void* ssl)
    int SSL_get_error(const void* ssl, int result)
    long SSL_get_verify_result(const void* ssl)
    const char* X509_verify_cert_error_string(long result)
    const void* BIO_s_mem()
    void* BIO_new(const void* method)
    int BIO_free(void* bio)
    int BIO_write(void* bio, const void* data, int size)
    int BIO_read(void* bio, void* data, int size)
    size_t BIO_ctrl_pending(void* bio)
    void ERR_clear_error()
    unsigned long ERR_peek_last_error()
    const char* ERR_reason_error_string(unsigned long error)

cdef enum:  # of OpenSSL's headers; part of its ABI
    SSL_CTRL_SET_TLSEXT_HOSTNAME = 55
    SSL_CTRL_SET_MIN_PROTO_VERSION = 123
    TLSEXT_NAMETYPE_host_name = 0
    TLS1_3_VERSION = 0x0304
    SSL_FILETYPE_PEM = 1
    SSL_VERIFY_PEER = 1
    SSL_VERIFY_FAIL_IF_NO_PEER_CERT = 2
    X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS = 4
    X509_V_OK = 0
    SSL_ERROR_SSL = 1
    SSL_ERROR_WANT_READ = 2
    SECURITY_LEVEL = 2  # as Python's: keys of 112 bits of security and more
    PIECE_SIZE = 1 << 14
    RECORD_SIZE_MAX = 1 << 14  # of the application's bytes

# Those that `tls_records` knows. A server takes the client's choice: between our own that is the first.
cdef const char* SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

LIBRARY_NAMES = "libssl.so.3", "libssl.so.1.1"
"""Where Python's `ssl` is not a shared object of its own: the system's."""

cdef bint is_loaded = False


class OpenSslMissingError(ImportError):
    """The OpenSSL of this Python cannot be called, and the system has none."""


def load_openssl():
    """Idempotent. Raises `OpenSslMissingError`."""
    global is_loaded
    if is_loaded:
        return
    import _ssl

    paths = [path for path in (getattr(_ssl, "__file__", None), *LIBRARY_NAMES) if path]
    missing = []
    for path in paths:
        missed = find_handshake_functions(path.encode())
        if missed == NULL:
            missed = find_ciphers(path.encode())
        if missed == NULL:
            is_loaded = True
            return
        missing.append(f"{path} lacks {missed.decode()}")
    raise OpenSslMissingError(f"TLS needs OpenSSL 1.1.1 or newer: {'; '.join(missing)}")


cdef class TlsContext:
    """What connections of one side are made from. Never changes; may be used from any thread.

    With `ca` the peer must show a certificate that leads to it, with `certificate` and `key` we show one; all
    are paths of PEM files. After `records_per_key` records that we write comes the next key.
    Raises ssl.SSLError, `OpenSslMissingError`.
    """

    def __cinit__(
        self, *, bint is_server, certificate=None, key=None, ca=None, records_per_key=RECORDS_PER_KEY
    ):
        load_openssl()
        self.is_server = is_server
        self.records_per_key = records_per_key
        if not is_server and ca is None:
            raise ValueError("a client checks whom it calls: give a CA")
        ERR_clear_error()
        self.context = SSL_CTX_new(TLS_server_method() if is_server else TLS_client_method())
        if self.context == NULL:
            raise MemoryError("no memory for a TLS context")
        SSL_CTX_set_security_level(self.context, SECURITY_LEVEL)
        _check(SSL_CTX_ctrl(self.context, SSL_CTRL_SET_MIN_PROTO_VERSION, TLS1_3_VERSION, NULL))
        _check(SSL_CTX_set_ciphersuites(self.context, SUITES))
        SSL_CTX_set_keylog_callback(self.context, take_secret)
        if is_server:
            _check(SSL_CTX_set_num_tickets(self.context, 0))  # nobody of us resumes a session
            choose_protocols(self.context)
        if certificate is not None:
            _check(SSL_CTX_use_certificate_chain_file(self.context, _path(certificate)))
            _check(SSL_CTX_use_PrivateKey_file(self.context, _path(key), SSL_FILETYPE_PEM))
            _check(SSL_CTX_check_private_key(self.context))
        if ca is not None:
            _check(SSL_CTX_load_verify_locations(self.context, _path(ca), NULL))
            SSL_CTX_set_verify(self.context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL)

    def __dealloc__(self):
        if self.context != NULL:
            SSL_CTX_free(self.context)


cdef class TlsConnection:
    """One connection's TLS. One caller at a time; nothing here waits.

    A client names whom it calls, a host name or an IP address, for which the server's certificate must be.
    After an error it must not be used again, but for `take_output`: the peer is told why.
    """

    def __cinit__(self, TlsContext context not None, server_hostname=None):
        ERR_clear_error()
        self.context = context
        self.ssl = SSL_new(context.context)
        self.incoming = BIO_new(BIO_s_mem())
        self.outgoing = BIO_new(BIO_s_mem())
        if self.ssl == NULL or self.incoming == NULL or self.outgoing == NULL:
            if self.incoming != NULL:
                BIO_free(self.incoming)
            if self.outgoing != NULL:
                BIO_free(self.outgoing)
            raise MemoryError("no memory for a TLS connection")
        SSL_set_bio(self.ssl, self.incoming, self.outgoing)  # which frees them from now on
        _check(SSL_set_ex_data(self.ssl, 0, &self.secrets))
        if context.is_server:
            SSL_set_accept_state(self.ssl)
        else:
            self._expect(server_hostname)
            SSL_set_connect_state(self.ssl)

    def __dealloc__(self):
        OPENSSL_cleanse(&self.secrets, sizeof(self.secrets))
        if self.ssl != NULL:
            SSL_free(self.ssl)

    def handshake(self, bytes data not None=b""):
        """Takes what has come; whether the handshake is done. See `take_output` in any case, also after an
        error. Raises ssl.SSLError, of which SSLCertVerificationError is one."""
        cdef int result
        if self.is_ready:
            self.records.feed(<const uint8_t*> PyBytes_AS_STRING(data), len(data))
            return True
        if data and BIO_write(self.incoming, PyBytes_AS_STRING(data), len(data)) != len(data):
            raise MemoryError("no memory for what has come of a handshake")
        ERR_clear_error()
        result = SSL_do_handshake(self.ssl)
        if result == 1:
            self._begin_records()
            return True
        if SSL_get_error(self.ssl, result) == SSL_ERROR_WANT_READ:
            return False
        raise self.failure()

    def decrypt(self, bytes data not None):
        """As `TlsRecords.decrypt`, after the handshake."""
        return self._ready_records().decrypt(data)

    def encrypt(self, bytes data not None):
        """As `TlsRecords.encrypt`, after the handshake."""
        return self._ready_records().encrypt(data)

    def take_output(self):
        """Bytes for the socket that have not been taken yet: of the handshake, or of TLS itself."""
        if self.is_ready:
            return self.records.take_output()
        return _take_all(self.outgoing)

    def shutdown(self):
        """The bytes that tell the peer that nothing more comes."""
        return self.records.shutdown() if self.is_ready else self.take_output()

    def _ready_records(self):
        if not self.is_ready:
            raise SSLError(SSL_ERROR_SSL, "the handshake of TLS is not done")
        return self.records

    def _begin_records(self):
        """From now on OpenSSL's connection has no part in this one: it goes."""
        cdef bytes sent, come, ours, theirs
        cdef int fragment = SSL_SESSION_get_max_fragment_length(SSL_get_session(self.ssl))
        ours = self.secrets.client.data[:self.secrets.client.size]
        theirs = self.secrets.server.data[:self.secrets.server.size]
        if not ours or not theirs:
            raise SSLError(SSL_ERROR_SSL, "OpenSSL does not tell the secrets of a connection")
        OPENSSL_cleanse(&self.secrets, sizeof(self.secrets))
        if self.context.is_server:
            ours, theirs = theirs, ours
        self.records = TlsRecords(
            SSL_CIPHER_get_protocol_id(SSL_get_current_cipher(self.ssl)),
            read_secret=theirs,
            write_secret=ours,
            is_client=not self.context.is_server,
            record_size_max=256 << fragment if fragment else RECORD_SIZE_MAX,  # that a client asked for
            records_per_key=self.context.records_per_key,
        )
        sent, come = _take_all(self.outgoing), _take_all(self.incoming)
        self.records.put_output(<const uint8_t*> PyBytes_AS_STRING(sent), len(sent))
        self.records.feed(<const uint8_t*> PyBytes_AS_STRING(come), len(come))
        self.is_ready = True
        SSL_free(self.ssl)
        self.ssl = self.incoming = self.outgoing = NULL

    def _expect(self, server_hostname):
        """Names the server, so that a certificate for another is refused."""
        if not server_hostname or server_hostname.startswith(".") or "\0" in server_hostname:
            raise ValueError(f"no server can be named {server_hostname!r}")
        try:
            address = str(ipaddress.ip_address(server_hostname)).encode()
        except ValueError:
            name = server_hostname.encode("idna")
            SSL_set_hostflags(self.ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS)
            _check(SSL_set1_host(self.ssl, name))
            _check(
                SSL_ctrl(
                    self.ssl,
                    SSL_CTRL_SET_TLSEXT_HOSTNAME,
                    TLSEXT_NAMETYPE_host_name,
                    PyBytes_AS_STRING(name),
                )
            )
        else:
            _check(X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(self.ssl), address))

    cdef void feed(self, const uint8_t* data, size_t size) noexcept nogil:
        """Bytes from the socket. These are `TlsRecords`' of the same names, after the handshake."""
        if self.is_ready:
            self.records.feed(data, size)

    cdef bint has_input(self) noexcept nogil:
        return self.is_ready and self.records.has_input()

    cdef ssize_t read_some(self, uint8_t* buffer, size_t size) noexcept nogil:
        return self.records.read_some(buffer, size) if self.is_ready else -1

    cdef bint write_all(self, const uint8_t* data, size_t size) noexcept nogil:
        return self.is_ready and self.records.write_all(data, size)

    cdef size_t take_some_output(self, uint8_t* buffer, size_t size) noexcept nogil:
        return self.records.take_some_output(buffer, size) if self.is_ready else 0

    cdef object failure(self):
        """Why the last call failed, in the thread that made it."""
        cdef long verified
        if self.is_ready:
            return self.records.failure()
        verified = SSL_get_verify_result(self.ssl)
        if verified != X509_V_OK:
            problem = X509_verify_cert_error_string(verified).decode()
            return SSLCertVerificationError(SSL_ERROR_SSL, f"certificate verify failed: {problem}")
        return _last_error()


cdef void take_secret(const void* ssl, const char* line) noexcept nogil:
    """A line of OpenSSL's log of keys: a name, the client's random number and a secret, both in hex."""
    cdef TrafficSecrets* secrets = <TrafficSecrets*> SSL_get_ex_data(ssl, 0)
    cdef TrafficSecret* secret
    cdef const char* digits = strrchr(line, b" ")
    if secrets == NULL or digits == NULL:
        return
    if strncmp(line, b"CLIENT_TRAFFIC_SECRET_0 ", 24) == 0:
        secret = &secrets.client
    elif strncmp(line, b"SERVER_TRAFFIC_SECRET_0 ", 24) == 0:
        secret = &secrets.server
    else:
        return
    digits += 1
    secret.size = 0
    while digits[0] and digits[1] and secret.size < SECRET_SIZE_MAX:
        secret.data[secret.size] = half_byte(digits[0]) << 4 | half_byte(digits[1])
        secret.size += 1
        digits += 2


cdef uint8_t half_byte(char digit) noexcept nogil:
    return digit - 48 if digit <= 57 else (digit | 32) - 87


cdef bytes _take_all(void* bio):
    """What waits in a BIO. Not by a reset of it: that clears as much memory as the longest message once took.
    """
    cdef char[PIECE_SIZE] piece
    cdef int size
    taken = b""
    while (size := BIO_read(bio, piece, PIECE_SIZE)) > 0:
        taken += piece[:size]
    return taken


cdef _path(path):
    return str(path).encode()


cdef int _check(long result) except -1:
    if result != 1:
        raise _last_error()
    return 0


cdef _last_error():
    cdef unsigned long error = ERR_peek_last_error()
    cdef const char* reason = ERR_reason_error_string(error) if error else NULL
    return SSLError(SSL_ERROR_SSL, "TLS failed" if reason == NULL else reason.decode())
