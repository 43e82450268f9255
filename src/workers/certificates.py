"""What is wrong with a server's certificate and what to do about it, and which servers need none."""

import ssl
from ipaddress import ip_address

# OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED, HOSTNAME_MISMATCH and IP_ADDRESS_MISMATCH.
_EXPIRED, _OTHER_NAMES = 10, (62, 64)


def mend(error: ssl.SSLCertVerificationError, *, address: str, authority: str) -> str:
    """A sentence; `address` and `authority` say where the server is named, and whom we trust."""
    if error.verify_code == _EXPIRED:
        return "its certificate has expired: renew it"
    if error.verify_code in _OTHER_NAMES:
        return (
            f"its certificate is made out to another name: name the server as it does, in {address}"
        )
    return f"its certificate is not to be trusted ({error.verify_message}): name the authority that signed it in {authority}"


def is_here(host: str) -> bool:
    """Whether nobody can be between us and this host: it is this machine, or a socket on it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("/")
