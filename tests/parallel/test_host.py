"""Messages between ranks, without a group: what one rank alone sees."""

import pytest

from megaslm.errors import UserError
from megaslm.parallel import host


def test_without_a_group_every_function_is_that_of_one_rank():
    assert host.rank() == 0 and host.world_size() == 1
    assert host.gather("mine") == ["mine"] and host.broadcast("mine") == "mine"
    assert host.together(lambda: 3) == 3 and host.on_first(lambda: 4) == 4


def test_what_is_raised_is_raised_again():
    def fail():
        raise UserError("a file is missing")

    with pytest.raises(UserError, match="a file is missing"):
        host.together(fail)
    with pytest.raises(UserError, match="a file is missing"):
        host.on_first(fail)


def test_two_ranks_agree_on_the_failure_of_one(fork_ranks, tmp_path):
    """Rank 1 fails alone; both raise its message and neither waits for the other."""
    script = tmp_path / "agree.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from megaslm.errors import UserError\n"
        "from megaslm.parallel import host\n"
        "dist.init_process_group('gloo')\n"
        "def work():\n"
        "    if host.rank() == 1: raise UserError('only rank 1 can not see the file')\n"
        "    return 'seen'\n"
        "try: host.together(work)\n"
        "except UserError as error: message = str(error)\n"
        "heard = [host.rank(), message, host.on_first(lambda: 'from 0'), host.gather(host.rank())]\n"
        f"open(r'{tmp_path}/' + str(host.rank()), 'w').write(repr(heard))\n"
        "dist.destroy_process_group()\n"
    )
    finished = fork_ranks(script, [], 2)
    assert finished.code == 0, finished.err
    for rank in (0, 1):
        heard = [rank, "only rank 1 can not see the file", "from 0", [0, 1]]
        assert (tmp_path / str(rank)).read_text() == repr(heard)
