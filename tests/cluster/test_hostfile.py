"""The hostfile: what is read, and one message with the line for every error in it."""

import pytest

from megaslm.cluster import Node, read_hostfile
from megaslm.errors import UserError


@pytest.fixture
def hostfile(tmp_path):
    def write(text: str):
        path = tmp_path / "hosts"
        path.write_text(text)
        return path

    return write


def test_nodes_in_their_order_without_comments(hostfile):
    path = hostfile("# the cluster\nworker-1 slots=8\n\nworker-0   slots=8 # the second\n  10-0-0-3 slots=8\n")
    assert read_hostfile(path) == [Node("worker-1", 8), Node("worker-0", 8), Node("10-0-0-3", 8)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=8\nb 8\n", [":2:", "'b 8'", "HOST slots=N"]),
        ("a slots=8\nb slots=8 gpus=2\n", [":2:", "'b slots=8 gpus=2'"]),
        ("a slots=eight\n", [":1:", "'a slots=eight'"]),
        ("a slots=8\n\n# b\na slots=8\n", [":4:", "a stands in line 1 already"]),
        ("a slots=0\n", [":1:", "a has no slots"]),
        ("a slots=8\nb slots=4\n", [":2:", "b has 4 slots and a has 8"]),
        ("# nothing\n\n", ["names no node"]),
        ("a slots = 8\n", [":1:"]),  # DeepSpeed does not read it
        ("localhost,b slots=1\n", [":1:", "'localhost,b slots=1'", "name"]),
        ("me@a slots=8\n", [":1:"]),
        ("h[1-3] slots=8\n", [":1:"]),
    ],
)
def test_an_error_is_told_with_its_line(hostfile, text, words):
    path = hostfile(text)
    with pytest.raises(UserError) as error:
        read_hostfile(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert [word for word in words if word not in message] == []


def test_a_file_that_is_not_there_or_is_no_text(tmp_path, hostfile):
    with pytest.raises(UserError, match="nowhere: No such file"):
        read_hostfile(tmp_path / "nowhere")
    path = hostfile("")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not text"):
        read_hostfile(path)
