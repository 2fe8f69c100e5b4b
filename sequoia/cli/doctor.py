"""`sequoia doctor`: what is right, what is wrong, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator

from rich.console import Console

from sequoia.cli.access_flags import access_of, add_access
from sequoia.cli.checkup.finding import Finding, findings_table
from sequoia.cli.checkup.machine import check_machine
from sequoia.cli.plan import address_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    parser.epilog = "exit status: 0 nothing is bad, 1 something is"
    parser.add_argument("--address", help="of a coordinator to look at (default: what `sequoia up` serves, if it runs)")
    add_access(parser)
    parser.add_argument("--redis", metavar="URL", help="of the Redis that keeps plans (or SEQUOIA_REDIS)")
    parser.add_argument("--target", metavar="MODEL", help="look at this model before it is served")
    parser.add_argument("--draft", metavar="MODEL", help="with --target: and whether this one fits it")
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    """Look, and tell."""
    if arguments.draft is not None and arguments.target is None:
        from sequoia.errors import InvalidArgument

        raise InvalidArgument("says what a target is drafted by; give --target too", "draft")
    findings = list(_findings(arguments))
    if arguments.json:
        print(json.dumps([each.to_dict() for each in findings]))
    else:
        Console().print(findings_table(findings))
    return int(any(each.grade == "bad" for each in findings))


def _findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield from check_machine()
    if arguments.target is not None:
        from sequoia.cli.checkup.models import check_models

        yield from check_models(arguments.target, arguments.draft)
    yield from _check_system(arguments)
    redis_url = arguments.redis or os.environ.get("SEQUOIA_REDIS")
    if redis_url:
        from sequoia.access import tls_of
        from sequoia.cli.checkup.redis import look_at_redis

        yield from look_at_redis(redis_url, tls_of(access_of(arguments)))


def _check_system(arguments: argparse.Namespace) -> Iterator[Finding]:
    """What runs at the address; that nothing does is no fault where none was named."""
    from sequoia.cli.checkup.running import check_running
    from sequoia.client import Client

    is_named = arguments.address is not None or "SEQUOIA_ADDRESS" in os.environ
    with Client(address_of(arguments), **access_of(arguments)) as client:
        found = list(check_running(client))
    if not is_named and found[0].subject == "coordinator":
        yield Finding("system", "note", f"none runs at {address_of(arguments)}", "`sequoia up` starts one")
    else:
        yield from found
