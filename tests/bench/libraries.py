"""Programs that use the standard library's `ssl`, or what stands in its place, through other libraries.

Run as processes by `run.py`.  ``http-server`` and ``cheroot`` print ``port N`` and end when their stdin does;
``http-client`` and ``mqtt-client`` print what they measured, as JSON.
"""

from __future__ import annotations

import argparse
import http.client
import http.server
import importlib
import json
import os
import ssl
import statistics
import sys
import threading
import time
from typing import Any

BODY = b"x" * 1000


class Answer(http.server.BaseHTTPRequestHandler):
    """A kilobyte, on a connection that stays."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    """The bridge does it anyway.  The stdlib's server waits 40 ms for each answer without."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


def http_server(module: Any, options: argparse.Namespace) -> None:
    """`http.server`, a thread per connection, its listening socket wrapped."""
    context = module.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.cert, options.key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print(f"port {server.server_address[1]}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


def application(_: dict[str, Any], start_response: Any) -> list[bytes]:
    """The same kilobyte from a WSGI server."""
    start_response("200 OK", [("Content-Length", str(len(BODY)))])
    return [BODY]


def cheroot(module: Any, options: argparse.Namespace) -> None:
    """cheroot, with ten threads, its default, and the adapter for the standard library's `ssl`."""
    from cheroot import wsgi
    from cheroot.ssl.builtin import BuiltinSSLAdapter

    server = wsgi.Server(("127.0.0.1", 0), application)
    server.ssl_adapter = BuiltinSSLAdapter(options.cert, options.key)
    if module is not ssl:
        server.ssl_adapter.context = module.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.ssl_adapter.context.load_cert_chain(options.cert, options.key)
    server.prepare()
    print(f"port {server.bind_addr[1]}", flush=True)
    threading.Thread(target=server.serve, daemon=True).start()
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


def unverified(module: Any) -> Any:
    """A client's context for the throw-away certificate."""
    context = module.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def http_client(module: Any, options: argparse.Namespace) -> None:
    """`http.client`, one thread and one connection that stays for each client."""
    context, counts = unverified(module), [0] * options.clients
    begin = time.monotonic() + options.warmup
    end = begin + options.seconds

    def ask(number: int) -> None:
        connection = http.client.HTTPSConnection("127.0.0.1", options.port, context=context)
        while (now := time.monotonic()) < end:
            connection.request("GET", "/")
            assert connection.getresponse().read() == BODY
            counts[number] += now >= begin
        connection.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"operations": sum(counts), "seconds": options.seconds}), flush=True)


def mqtt_client(module: Any, options: argparse.Namespace) -> None:
    """paho-mqtt: from publish to the message's return from the broker, again and again."""
    from paho.mqtt import client as mqtt

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.tls_set_context(unverified(module))
    arrived, subscribed, took = threading.Event(), threading.Event(), []
    client.on_message = lambda *_: arrived.set()
    client.on_connect = lambda *_: client.subscribe("bench")
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect("127.0.0.1", options.port)
    client.loop_start()
    assert subscribed.wait(10)
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        arrived.clear()
        begin = time.perf_counter()
        client.publish("bench", b"x" * 64)
        assert arrived.wait(10)
        took.append(time.perf_counter() - begin)
    client.disconnect()
    client.loop_stop()
    p50 = 1e6 * statistics.median(took)
    print(json.dumps({"operations": len(took), "seconds": options.seconds, "p50_us": p50}), flush=True)


ROLES = {
    "http-server": http_server,
    "cheroot": cheroot,
    "http-client": http_client,
    "mqtt-client": mqtt_client,
}


def main() -> None:
    """Plays the role that the command line says, on the core that it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("module", choices=("ssl", "bridge.ssl"))
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--cert")
    parser.add_argument("--key")
    parser.add_argument("--port", type=int)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--warmup", type=float)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    ROLES[options.role](importlib.import_module(options.module), options)


if __name__ == "__main__":
    main()
