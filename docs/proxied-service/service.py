#!/usr/bin/env python3
"""Notes: a service that keeps its own data, behind a Tidemark gateway.

It has one table of its own in SQLite. What goes into it comes from the region's event stream and from
nowhere else; what it shows, it labels with the position that its rows have reached; what it is asked to
write, it appends through the gateway. Nothing but Python's standard library is needed.
"""

import argparse
import json
import os
import socket
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

STREAM = "EVENTS-1"
HEARTBEAT_SECONDS = 5
BODY_BYTES_MAX = 64 * 1024
TOKEN = "Consistency-Token"
POSITION = "Consistency-Position"


class Store:
    """The notes, and how far they go. Both move in one transaction, and are read in one."""

    def __init__(self, path):
        self.path = path
        with self.connect() as database:
            database.execute("pragma journal_mode = wal")
            database.executescript(
                """create table if not exists note (id text primary key, text text not null);
                   create table if not exists reached (one integer primary key check (one = 1),
                       epoch integer not null, position integer not null, event_id text not null);
                   insert or ignore into reached values (1, 1, 0,
                       '00000000-0000-0000-0000-000000000000');"""
            )

    def connect(self):
        # Transactions begin and end where it says so below.
        return closing(sqlite3.connect(self.path, isolation_level=None))

    def reached(self):
        with self.connect() as database:
            return database.execute("select epoch, position, event_id from reached").fetchone()

    def apply(self, event):
        """Applies one event, once, and only the one that follows."""
        with self.connect() as database:
            database.execute("begin immediate")
            (_, position, last_id) = database.execute(
                "select epoch, position, event_id from reached"
            ).fetchone()
            if event.position <= position:
                database.execute("rollback")
                return
            if event.position != position + 1 or event.previous_id != last_id:
                database.execute("rollback")
                raise Broken(f"{event.position} does not follow {position}")
            if (event.aggregate_type, event.type) == ("note", "NoteWritten"):
                database.execute(
                    "insert into note values (?, ?) on conflict (id) do update set text = excluded.text",
                    (event.aggregate_id, json.loads(event.data)["text"]),
                )
            # Events of others move it too: they are read, and they change nothing here.
            database.execute(
                "update reached set epoch = ?, position = ?, event_id = ?",
                (event.epoch, event.position, event.id),
            )
            database.execute("commit")

    def notes(self, note_id=None):
        """Notes, and the position that they are as of: one snapshot of both."""
        with self.connect() as database:
            database.execute("begin")
            epoch, position, _ = database.execute(
                "select epoch, position, event_id from reached"
            ).fetchone()
            rows = database.execute(
                "select id, text from note where ?1 is null or id = ?1 order by id", (note_id,)
            ).fetchall()
            database.execute("commit")
        return [{"id": id, "text": text} for id, text in rows], f"{epoch}.{position}"


class Broken(Exception):
    """The stream is not what it should be, or its connection is lost."""


class Event:
    """One message of the stream, as docs/stream.md describes it."""

    def __init__(self, headers, data):
        self.id = headers["nats-msg-id"]
        self.previous_id = headers["tidemark-previous-id"]
        self.epoch = int(headers["tidemark-epoch"])
        self.position = int(headers["tidemark-position"])
        self.aggregate_type = headers["tidemark-aggregate-type"]
        self.aggregate_id = headers["tidemark-aggregate-id"]
        self.type = headers["tidemark-event-type"]
        self.data = data


class Nats:
    """As much of the NATS protocol as it takes to read a stream in order."""

    def __init__(self, address, user, password):
        host, port = address.rsplit(":", 1)
        # The server shows that it lives more often than this.
        self.socket = socket.create_connection((host, int(port)), 3 * HEARTBEAT_SECONDS)
        self.file = self.socket.makefile("rb")
        self.file.readline()
        login = {"verbose": False, "headers": True, "user": user, "pass": password}
        self.send(f"CONNECT {json.dumps(login)}\r\n")

    def send(self, text):
        self.socket.sendall(text.encode())

    def events(self, after):
        """Every event after a position, without end."""
        inbox = f"_INBOX.notes{time.time_ns()}"
        config = {
            "deliver_subject": f"{inbox}.event",
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": after + 1,
            "ack_policy": "none",
            "flow_control": True,
            "idle_heartbeat": HEARTBEAT_SECONDS * 1_000_000_000,
            "mem_storage": True,
        }
        ask = json.dumps({"stream_name": STREAM, "config": config})
        # The server delivers to a subscription of this very subject, not to one with a wildcard.
        self.send(f"SUB {inbox}.event 1\r\nSUB {inbox}.made 2\r\n")
        self.send(f"PUB $JS.API.CONSUMER.CREATE.{STREAM} {inbox}.made {len(ask)}\r\n{ask}\r\n")
        while True:
            subject, reply, status, headers, data = self.message()
            if subject == f"{inbox}.made":
                made = json.loads(data)
                if "error" in made:
                    raise Broken(made["error"]["description"])
            elif status.startswith("100"):
                # A heartbeat, or a question whether we keep up.
                if reply:
                    self.send(f"PUB {reply} 0\r\n\r\n")
            else:
                yield Event(headers, data)

    def message(self):
        """The next message: subject, reply subject, status, headers, data."""
        while True:
            line = self.file.readline().decode().rstrip("\r\n")
            word, _, rest = line.partition(" ")
            if word == "PING":
                self.send("PONG\r\n")
            elif word in ("MSG", "HMSG"):
                parts = rest.split(" ")
                sizes = 2 if word == "HMSG" else 1
                reply = parts[2] if len(parts) == 3 + sizes else None
                head_bytes = int(parts[-2]) if word == "HMSG" else 0
                payload = self.file.read(int(parts[-1]) + 2)[:-2]
                status, headers = parsed(payload[:head_bytes].decode())
                return parts[0], reply, status, headers, payload[head_bytes:]
            elif word not in ("INFO", "PONG", "+OK"):
                raise Broken(line or "the connection is closed")


def parsed(head):
    """The status and the headers of a message."""
    first, *lines = head.split("\r\n")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    headers = {name.strip().lower(): value.strip() for name, value in pairs}
    return first.removeprefix("NATS/1.0").strip(), headers


def follow(store, arguments):
    """Applies the stream to the store, for ever. An event that cannot be applied ends the process: a
    store that passed over it would say that it has what it has not."""
    try:
        keep_following(store, arguments)
    except Exception as error:
        print(f"an event cannot be applied: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def keep_following(store, arguments):
    while True:
        try:
            nats = Nats(arguments.nats, arguments.nats_user, arguments.nats_password)
            for event in nats.events(store.reached()[1]):
                store.apply(event)
        except (OSError, Broken) as error:
            print(f"the stream is read again: {error}", file=sys.stderr, flush=True)
            time.sleep(0.5)


class Handler(BaseHTTPRequestHandler):
    """`GET /notes`, `GET /notes/{id}`, and `POST /notes/{id}` with `{"text": ..}`."""

    protocol_version = "HTTP/1.1"
    store = None
    gateway = None

    def do_GET(self):
        note_id = self.note_id()
        notes, position = self.store.notes(note_id)
        if note_id is None:
            self.answer(200, {"notes": notes}, {POSITION: position})
        elif notes:
            self.answer(200, notes[0], {POSITION: position})
        else:
            # That there is none is as good as its position, too.
            self.answer(404, {"id": note_id}, {POSITION: position})

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        note_id = self.note_id()
        text = self.text(length) if note_id and 0 < length <= BODY_BYTES_MAX else None
        if text is None:
            self.close_connection = True
            self.answer(400, {"error": "a note has an id and a text"}, {})
            return
        event = {"type": "NoteWritten", "data": {"text": text}}
        request = urllib.request.Request(
            f"{self.gateway}/v1/aggregates/note/{quote(note_id, safe='')}/events",
            data=json.dumps({"events": [event]}).encode(),
            headers={"Content-Type": "application/json"},
        )
        # What the caller has seen goes along, and what it has written then comes back.
        if token := self.headers.get(TOKEN):
            request.add_header(TOKEN, token)
        try:
            with urllib.request.urlopen(request, timeout=10) as appended:
                status, token = appended.status, appended.headers[TOKEN]
        except urllib.error.HTTPError as refused:
            self.answer(refused.code, json.load(refused), {})
            return
        except OSError as error:
            self.answer(503, {"error": f"the gateway cannot be reached: {error}"}, {})
            return
        self.answer(status, {"id": note_id, "text": text}, {TOKEN: token})

    def text(self, length):
        """The text in the body; `None` when there is none."""
        try:
            text = json.loads(self.rfile.read(length))["text"]
        except (ValueError, KeyError, TypeError):
            return None
        return text if isinstance(text, str) else None

    def note_id(self):
        """The id in the path; `None` when there is none."""
        path = self.path.split("?")[0].rstrip("/")
        return unquote(path.removeprefix("/notes/")) if path.startswith("/notes/") else None

    def answer(self, status, body, headers):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Silent: the gateway in front of it counts requests."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--listen", default="127.0.0.1:9000", help="host:port")
    parser.add_argument("--store", default="notes.sqlite", help="its file")
    parser.add_argument("--gateway", required=True, help="URL of the region's gateway")
    parser.add_argument("--nats", required=True, help="host:port of the region's NATS server")
    parser.add_argument("--nats-user", required=True)
    parser.add_argument("--nats-password", required=True)
    arguments = parser.parse_args()
    Handler.store, Handler.gateway = Store(arguments.store), arguments.gateway
    threading.Thread(target=follow, args=(Handler.store, arguments), daemon=True).start()
    host, port = arguments.listen.rsplit(":", 1)
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
