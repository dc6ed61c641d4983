"""TLS by the OpenSSL that Python's own `ssl` uses, called without the interpreter in between.

::

    bytes from the socket -> feed ->  +-----+  -> read_some -> bytes of the application
    bytes for the socket  <- output <-| SSL |  <- write_all <- bytes of the application
                                      +-----+

Python's `ssl` gives no native way to its connections, so contexts are made here anew, from the same files and
with the same checks: TLS 1.3, the chain up to the CA, and the name or address that was called. No header
of OpenSSL is needed to build this: its functions, which have been the same since 1.1.1, are looked up in the
library that `_ssl` has loaded.

Not here: sockets (`channel`, `service.tls_protocol`), when files are loaded anew (`service.tls`).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t

import ipaddress
from ssl import SSLCertVerificationError, SSLError, SSLZeroReturnError

cdef extern from * nogil:
    """
    #include <dlfcn.h>
    #include <stddef.h>

    #define OPENSSL_FUNCTIONS(X) \\
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
        X(int, SSL_shutdown, (void *ssl)) \\
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
        X(int, SSL_read, (void *ssl, void *buffer, int size)) \\
        X(int, SSL_write, (void *ssl, const void *buffer, int size)) \\
        X(int, SSL_pending, (const void *ssl)) \\
        X(int, SSL_key_update, (void *ssl, int kind)) \\
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
        X(unsigned long, ERR_peek_error, (void)) \\
        X(unsigned long, ERR_peek_last_error, (void)) \\
        X(const char *, ERR_reason_error_string, (unsigned long error))

    #define OPENSSL_DECLARE(result, name, arguments) static result (*name) arguments;
    OPENSSL_FUNCTIONS(OPENSSL_DECLARE)

    #define OPENSSL_FIND(result, name, arguments) \\
        if (!(*(void **) &name = dlsym(library, #name))) return #name;

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

    /* NULL, or what was not found. The library stays loaded. */
    static const char *find_openssl(const char *path) {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) return "the library";
        OPENSSL_FUNCTIONS(OPENSSL_FIND)
        return NULL;
    }
    """
    const char* find_openssl(const char* path)
    void choose_protocols(void* context)
    int SSL_shutdown(void* ssl)
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
    int SSL_read(void* ssl, void* buffer, int size)
    int SSL_write(void* ssl, const void* buffer, int size)
    int SSL_pending(const void* ssl)
    int SSL_key_update(void* ssl, int kind)
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
    unsigned long ERR_peek_error()
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
    SSL_ERROR_ZERO_RETURN = 6
    SSL_KEY_UPDATE_NOT_REQUESTED = 0
    SECURITY_LEVEL = 2  # as Python's: keys of 112 bits of security and more
    READ_SIZE_MAX = 1 << 30
    WITHOUT_GIL_SIZE = 1 << 16
    RECORD_SIZE_MAX = 1 << 14  # of the application's bytes
    SMALL_SIZE = RECORD_SIZE_MAX + 4096  # has room on the stack

RECORDS_PER_KEY = 1 << 24
"""AES-GCM is safe for 2**24.5 records of full size with one key (RFC 8446, 5.5), which OpenSSL does not
count; a busy manager gets there within hours."""

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
        missed = find_openssl(path.encode())
        if missed == NULL:
            is_loaded = True
            return
        missing.append(f"{path} lacks {missed.decode()}")
    raise OpenSslMissingError(f"TLS needs OpenSSL 1.1.1 or newer: {'; '.join(missing)}")


cdef class TlsContext:
    """What connections of one side are made from. Never changes; may be used from any thread.

    With `ca` the peer must show a certificate that leads to it, with `certificate` and `key` we show one; all
    are paths of PEM files. After `records_per_key` records that we write comes the next key. Raises
    ssl.SSLError, `OpenSslMissingError`.
    """

    def __cinit__(
        self,
        *,
        bint is_server,
        certificate=None,
        key=None,
        ca=None,
        uint64_t records_per_key=RECORDS_PER_KEY,
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
        if context.is_server:
            SSL_set_accept_state(self.ssl)
        else:
            self._expect(server_hostname)
            SSL_set_connect_state(self.ssl)

    def __dealloc__(self):
        if self.ssl != NULL:
            SSL_free(self.ssl)

    def handshake(self, bytes data not None=b""):
        """Takes what has come; whether the handshake is done. See `take_output` in any case, also after an
        error. Raises ssl.SSLError, of which SSLCertVerificationError is one."""
        cdef int result
        self.take_input(data)
        ERR_clear_error()
        result = SSL_do_handshake(self.ssl)
        if result == 1:
            return True
        if SSL_get_error(self.ssl, result) == SSL_ERROR_WANT_READ:
            return False
        raise self.failure()

    def decrypt(self, bytes data not None):
        """What the peer wrote, as far as it has come with `data`. Raises ssl.SSLError; ssl.SSLZeroReturnError
        when the peer has ended TLS and nothing came before that. Then see `take_output`."""
        cdef ssize_t size
        cdef size_t most
        cdef uint8_t* buffer
        cdef uint8_t[SMALL_SIZE] small
        self.take_input(data)
        # A record that had come in part is in neither of the two: OpenSSL has taken it already.
        most = BIO_ctrl_pending(self.incoming) + SSL_pending(self.ssl) + RECORD_SIZE_MAX
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
        cdef bint is_written = True
        cdef size_t size = len(data)
        cdef const uint8_t* begin = <const uint8_t*> PyBytes_AS_STRING(data)
        if size > WITHOUT_GIL_SIZE:
            with nogil:
                is_written = self.write_all(begin, size)
        elif size:
            is_written = self.write_all(begin, size)
        if not is_written:
            raise self.failure()
        return self.take_output()

    def take_output(self):
        """Bytes for the socket that have not been taken yet: of the handshake, or of TLS itself."""
        cdef size_t size = BIO_ctrl_pending(self.outgoing)
        if size == 0:
            return b""
        taken = PyBytes_FromStringAndSize(NULL, size)
        self.take_some_output(<uint8_t*> PyBytes_AS_STRING(taken), size)
        return taken

    def shutdown(self):
        """The bytes that tell the peer that nothing more comes."""
        if not self.is_failed:
            ERR_clear_error()
            SSL_shutdown(self.ssl)
        return self.take_output()

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

    cdef int take_input(self, bytes data) except -1:
        if data:
            self.feed(<const uint8_t*> PyBytes_AS_STRING(data), len(data))
        return 0

    cdef void feed(self, const uint8_t* data, size_t size) noexcept nogil:
        """Bytes from the socket, at most 1 GiB."""
        if BIO_write(self.incoming, data, <int> size) != <int> size:
            self.is_failed = True  # no memory

    cdef bint has_input(self) noexcept nogil:
        """Whether `read_some` may find something without another `feed`."""
        return SSL_pending(self.ssl) > 0 or BIO_ctrl_pending(self.incoming) > 0

    cdef ssize_t read_some(self, uint8_t* buffer, size_t size) noexcept nogil:
        """As much as is here; 0: a record is not whole yet; -1: see `failure`."""
        cdef size_t done = 0
        cdef int result
        if self.is_failed:
            return -1
        while done < size:
            forget_errors()
            result = SSL_read(self.ssl, buffer + done, <int> min(size - done, READ_SIZE_MAX))
            if result > 0:
                done += result
                if not self.has_input():
                    break  # to be told so by another call costs as much as the record did
                continue
            if SSL_get_error(self.ssl, result) == SSL_ERROR_WANT_READ:
                break
            self.is_failed = done == 0  # else the next call finds it again
            return done if done else -1
        return done

    cdef bint write_all(self, const uint8_t* data, size_t size) noexcept nogil:
        cdef size_t done = 0
        cdef int result
        if self.is_failed:
            return False
        while done < size:
            forget_errors()
            if self.record_count >= self.context.records_per_key:
                self.record_count = 0
                if SSL_key_update(self.ssl, SSL_KEY_UPDATE_NOT_REQUESTED) != 1:
                    self.is_failed = True
                    return False
            result = SSL_write(self.ssl, data + done, <int> min(size - done, READ_SIZE_MAX))
            if result <= 0:
                self.is_failed = True
                return False
            self.record_count += (result + RECORD_SIZE_MAX - 1) // RECORD_SIZE_MAX
            done += result
        return True

    cdef size_t take_some_output(self, uint8_t* buffer, size_t size) noexcept nogil:
        """How many bytes for the socket have been put into `buffer`. Not by a reset of the BIO: that clears
        as much memory as the longest message once took.
        """
        cdef int taken = BIO_read(self.outgoing, buffer, <int> min(size, READ_SIZE_MAX))
        return taken if taken > 0 else 0

    cdef object failure(self):
        """Why the last call failed, in the thread that made it."""
        cdef long verified = SSL_get_verify_result(self.ssl)
        if verified != X509_V_OK:
            problem = X509_verify_cert_error_string(verified).decode()
            return SSLCertVerificationError(SSL_ERROR_SSL, f"certificate verify failed: {problem}")
        if SSL_get_error(self.ssl, -1) == SSL_ERROR_ZERO_RETURN:
            return SSLZeroReturnError(SSL_ERROR_ZERO_RETURN, "the peer has ended TLS")
        return _last_error()


cdef void forget_errors() noexcept nogil:
    """What this thread left in OpenSSL's queue, which SSL_get_error would take for ours. To clear an empty
    queue takes a sixth of what a short record does.
    """
    if ERR_peek_error():
        ERR_clear_error()


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
