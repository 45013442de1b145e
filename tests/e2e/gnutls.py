"""As much of GnuTLS as is needed to send alerts inside an established session and to resume one with
another hello, which its command line tool can't."""

import ctypes

WARNING, FATAL = 1, 2
USER_CANCELED, INTERNAL_ERROR = 90, 80
CLIENT, CREDENTIALS_CERTIFICATE, NAME_DNS = 2, 1, 1

lib = ctypes.CDLL("libgnutls.so.30")
pointer = ctypes.c_void_p


class GnutlsError(OSError):
    pass


def check(code):
    if code < 0:
        lib.gnutls_strerror.restype = ctypes.c_char_p
        raise GnutlsError(code, lib.gnutls_strerror(code).decode())
    return code


class Datum(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_uint)]


class GnutlsClient:
    """A client over a connected blocking socket; verifies nothing."""

    def __init__(self, sock, version="1.2", name=None, protocols=(), session=None):
        self.sock = sock
        sock.setblocking(True)
        self.credentials, self.session = pointer(), pointer()
        check(lib.gnutls_certificate_allocate_credentials(ctypes.byref(self.credentials)))
        check(lib.gnutls_init(ctypes.byref(self.session), CLIENT))
        priorities = f"NORMAL:-VERS-ALL:+VERS-TLS{version}:%NO_TICKETS"
        check(lib.gnutls_priority_set_direct(self.session, priorities.encode(), None))
        check(lib.gnutls_credentials_set(self.session, CREDENTIALS_CERTIFICATE, self.credentials))
        if name:
            size = ctypes.c_size_t(len(name))
            check(lib.gnutls_server_name_set(self.session, NAME_DNS, name.encode(), size))
        if protocols:
            names = [ctypes.create_string_buffer(p.encode(), len(p)) for p in protocols]
            data = [Datum(ctypes.addressof(n), len(n)) for n in names]
            check(lib.gnutls_alpn_set_protocols(self.session, (Datum * len(data))(*data),
                                                len(data), 0))
        if session:
            check(lib.gnutls_session_set_data(self.session, session,
                                              ctypes.c_size_t(len(session))))
        lib.gnutls_transport_set_int2(self.session, sock.fileno(), sock.fileno())
        check(lib.gnutls_handshake(self.session))

    def session_data(self):
        """What another client can resume."""
        room, size = ctypes.create_string_buffer(1 << 14), ctypes.c_size_t(1 << 14)
        check(lib.gnutls_session_get_data(self.session, room, ctypes.byref(size)))
        return room.raw[:size.value]

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
