"""No network in tests: connecting to, or looking up, any host but this machine raises at once.

Python imports a module of this name at start when its folder is on PYTHONPATH. `make test` puts it there, so every
process obeys:
pytest, the workers of nbdev-test, and whatever they start. The error is no OSError on purpose: code that retries a bad
connection or
falls back to a cache would hide a forgotten download.
"""
import ipaddress
import socket

HERE = {'', 'localhost', 'localhost.localdomain', 'ip6-localhost', socket.gethostname()}


class NetworkBlocked(RuntimeError): "A test tried to leave this machine."


def is_local(host):
    "Whether `host` (a name or an address, str or bytes, None for any) is this machine."
    if host is None: return True
    if isinstance(host, bytes): host = host.decode()
    if host in HERE: return True
    try: address = ipaddress.ip_address(host.partition('%')[0])
    except ValueError: return False
    return address.is_loopback or address.is_unspecified


def check(host):
    "Refuse every host that is not this machine."
    if not is_local(host):
        raise NetworkBlocked(f"tests run without a network, but something asked for {host!r}: "
            "pass `pretrained=False`, `weights=None, weights_backbone=None`, or a local file")


def guard_address(method):
    "A socket method whose last argument is an address, refusing addresses elsewhere."
    def guarded(self, *args):
        if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(args[-1], tuple): check(args[-1][0])
        return method(self, *args)
    return guarded


def guard_host(function):
    "A name look-up, refusing names elsewhere."
    def guarded(host, *args, **kwargs):
        check(host)
        return function(host, *args, **kwargs)
    return guarded


def block():
    "Put the guards in, once."
    if getattr(socket, 'blocked', False): return
    for name in ('connect', 'connect_ex', 'sendto'):
        setattr(socket.socket, name, guard_address(getattr(socket.socket, name)))
    for name in ('getaddrinfo', 'gethostbyname', 'gethostbyname_ex'):
        setattr(socket, name, guard_host(getattr(socket, name)))
    socket.blocked = True


block()
