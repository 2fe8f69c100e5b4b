"""`sequoia up`: the whole system on this machine, until it is told to stop."""

from __future__ import annotations

import argparse
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sequoia.cli.deployment import Deployment, DeploymentSettings
from sequoia.cli.placement import PLACEMENTS
from sequoia.cli.process import wait_for_end
from sequoia.cli.steps import Steps
from sequoia.config import ENGINES, MODEL_FREE, OFFLOADS, QUANTIZATIONS
from sequoia.errors import Unavailable
from sequoia.redaction import redacted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    parser.epilog = "What has no flag here reaches the processes from the environment, such as SEQUOIA_NUM_SLOTS."
    add_model_arguments(parser)
    parser.add_argument(
        "--listen",
        default=DeploymentSettings.listen,
        metavar="ADDRESS",
        help="of the coordinator (default %(default)s)",
    )
    http = "serve the OpenAI API on this port of 127.0.0.1 too; 0: a free one (`sequoia gateway` serves it elsewhere)"
    parser.add_argument("--http", type=int, metavar="PORT", help=http)
    parser.add_argument("--redis", metavar="URL", help="use this Redis (or SEQUOIA_REDIS; default: start one)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object when it serves; what is done is told on stderr"
    )


def add_model_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Declare what `up`, `demo` and `bench` share: the models and how they run."""
    parser.add_argument(
        "--target",
        default=DeploymentSettings.target,
        metavar="MODEL",
        help="packaged name, hub id, folder or GGUF file (default %(default)s)",
    )
    draft = parser.add_mutually_exclusive_group()
    draft.add_argument(
        "--draft",
        metavar="MODEL",
        help=f"default: the target's own weights, quantised; {MODEL_FREE}: no model, what the text repeats",
    )
    draft.add_argument("--no-draft", action="store_true", help="plain decoding only")
    parser.add_argument(
        "--target-quantization",
        default=DeploymentSettings.target_quantization,
        choices=QUANTIZATIONS,
        help="weights of the target; what it then says is the rounded model's (default %(default)s)",
    )
    parser.add_argument(
        "--draft-quantization",
        choices=QUANTIZATIONS,
        help="default: int4 for an offloaded target's own weights; int8 on a CPU that computes in bfloat16, and "
        "without --draft; else none",
    )
    parser.add_argument(
        "--offload",
        default=DeploymentSettings.offload,
        choices=OFFLOADS,
        help="stream the target's weights: from files in the cache folder (disk, for a CPU), from the host's memory "
        "(host, for a GPU), where they do not fit into memory (auto), never (default %(default)s)",
    )
    limit = "most memory of an offloaded target, as 2GiB, on a GPU of its memory (default: what is free)"
    parser.add_argument("--memory-limit", metavar="SIZE", help=limit)
    resident = "layers of an offloaded target that stay in memory (default: as many as fit)"
    parser.add_argument("--resident-layers", type=int, metavar="N", help=resident)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--engine", default="auto", choices=ENGINES, help="what runs the layers (default auto: the first that can)"
    )
    parser.add_argument("--num-threads", type=int, default=0, metavar="N", help="per worker (default 0: one a core)")
    parser.add_argument("--context-length", type=int, metavar="N", help="longest session in tokens")
    add_placement(parser)
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="keep the logs here (default: a temporary folder)")


def add_placement(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Declare --placement and the flags of its cores."""
    parser.add_argument(
        "--placement",
        default=DeploymentSettings.placement,
        choices=PLACEMENTS,
        help="colocated: coordinator and workers in one process, the models taking turns; split: a process each; auto "
        "(default): colocated where both workers are on one device",
    )
    for role in ("target", "draft"):
        cores = f"pin the {role}'s process to N cores, apart from the other's; makes auto split"
        parser.add_argument(f"--{role}-cores", type=int, metavar="N", help=cores)


def deployment_settings(arguments: argparse.Namespace, listen: str, redis_url: str | None) -> DeploymentSettings:
    """What `add_model_arguments` collected, and where to listen."""
    return DeploymentSettings(
        target=arguments.target,
        draft=arguments.draft,
        target_quantization=arguments.target_quantization,
        draft_quantization=arguments.draft_quantization,
        engine=arguments.engine,
        has_draft=not arguments.no_draft,
        dtype=arguments.dtype,
        listen=listen,
        redis_url=redis_url,
        num_threads=arguments.num_threads,
        context_length=arguments.context_length,
        placement=arguments.placement,
        target_cores=arguments.target_cores,
        draft_cores=arguments.draft_cores,
        offload=arguments.offload,
        memory_limit=arguments.memory_limit,
        resident_layers=arguments.resident_layers,
        log_dir=arguments.log_dir,
    )


def stop_on_sigterm() -> None:
    """Make SIGTERM end this process like Ctrl-C, so that what it started is stopped in order."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def run(arguments: argparse.Namespace) -> int:
    """Start, say where, and stay until interrupted or until the target is lost."""
    stop_on_sigterm()
    steps = Steps(Console(stderr=arguments.json))
    settings = deployment_settings(arguments, arguments.listen, _redis_url(arguments))
    settings = replace(settings, http_port=arguments.http)
    with Deployment(settings, steps) as system:
        if arguments.json:
            print(json.dumps(_to_dict(system)), flush=True)
        steps.say(f"serving on {system.address}; Ctrl-C stops it")
        steps.say(f'  sequoia generate --address {system.address} "Why is the sky blue?"')
        if system.url:
            steps.say(f"  OPENAI_BASE_URL={system.url} is the OpenAI API, and {system.url.removesuffix('v1')} a chat")
        steps.say(f"  sequoia plan --address {system.address} --redis {redacted(system.redis_url)}")
        for process in wait_for_end(list(system.processes.values())):
            if process.name != "draft":
                raise Unavailable(process.obituary())
            steps.say(f"{process.obituary()}\nit goes on without a draft: the same text, decoded plainly")
    return 0


def _redis_url(arguments: argparse.Namespace) -> str | None:
    """The variable is for what has a password: a command line is read by whoever lists processes."""
    return arguments.redis or os.environ.get("SEQUOIA_REDIS")


def _to_dict(system: Deployment) -> dict[str, object]:
    """Ready for JSON: where everything is."""
    return {
        "address": system.address,
        "redis": redacted(system.redis_url),
        "url": system.url,
        "placement": system.placement,
        "workers": system.addresses,
        "processes": {name: process.pid for name, process in system.processes.items()},
    }
