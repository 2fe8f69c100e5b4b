"""The checked-in stubs against the .proto files."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PROTOS = sorted((ROOT / "protos" / "sequoia" / "v1").glob("*.proto"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    out = tmp_path_factory.mktemp("protos") / "set.pb"
    arguments = ["protoc", f"-I{ROOT / 'protos'}", f"--descriptor_set_out={out}", *map(str, PROTOS)]
    assert protoc.main(arguments) == 0
    files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    return {file.name: file for file in files}


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_checked_in_stub_has_the_descriptor_of_its_proto(
    proto: Path, compiled: dict[str, descriptor_pb2.FileDescriptorProto]
) -> None:
    module = importlib.import_module(f"sequoia.v1.{proto.stem}_pb2")
    checked_in = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(checked_in)
    fresh = compiled[f"sequoia/v1/{proto.name}"]
    fresh.ClearField("source_code_info")
    for message in fresh.message_type:
        clear_json_names(message)
    for message in checked_in.message_type:
        clear_json_names(message)
    assert checked_in == fresh, "run `make protos`"


def clear_json_names(message: descriptor_pb2.DescriptorProto) -> None:
    """Derived from the field names, and filled in by one of the two compilers only."""
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        clear_json_names(nested)
