"""As much of GnuTLS as is needed to send alerts inside an established session, which neither
Python's ssl nor the command line tools can."""

import ctypes

WARNING, FATAL = 1, 2
USER_CANCELED, INTERNAL_ERROR = 90, 80
CLIENT, CREDENTIALS_CERTIFICATE = 2, 1

lib = ctypes.CDLL("libgnutls.so.30")
pointer = ctypes.c_void_p


class GnutlsError(OSError):
    pass


def check(code):
    if code < 0:
        lib.gnutls_strerror.restype = ctypes.c_char_p
        raise GnutlsError(code, lib.gnutls_strerror(code).decode())
    return code


class GnutlsClient:
    """TLS 1.2 over a connected blocking socket; verifies nothing."""

    def __init__(self, sock):
        self.sock = sock
        sock.setblocking(True)
        self.credentials, self.session = pointer(), pointer()
        check(lib.gnutls_certificate_allocate_credentials(ctypes.byref(self.credentials)))
        check(lib.gnutls_init(ctypes.byref(self.session), CLIENT))
        check(lib.gnutls_priority_set_direct(self.session, b"NORMAL:-VERS-ALL:+VERS-TLS1.2", None))
        check(lib.gnutls_credentials_set(self.session, CREDENTIALS_CERTIFICATE, self.credentials))
        lib.gnutls_transport_set_int2(self.session, sock.fileno(), sock.fileno())
        check(lib.gnutls_handshake(self.session))

    def send(self, data):
        lib.gnutls_record_send.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
        lib.gnutls_record_send.restype = ctypes.c_ssize_t
        assert check(lib.gnutls_record_send(self.session, data, len(data))) == len(data)

    def receive(self):
        room = ctypes.create_string_buffer(1 << 16)
        lib.gnutls_record_recv.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
        lib.gnutls_record_recv.restype = ctypes.c_ssize_t
        size = check(lib.gnutls_record_recv(self.session, room, len(room)))
        return room.raw[:size]

    def alert(self, level, description):
        check(lib.gnutls_alert_send(self.session, level, description))

    def close(self):
        lib.gnutls_deinit(self.session)
        lib.gnutls_certificate_free_credentials(self.credentials)
        self.sock.close()
