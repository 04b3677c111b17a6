"""What a container lets a process take."""

import pytest

from megaslm import resources


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Lets this process be in the control group of a line of /proc/self/cgroup, with these files of limits."""

    def enter(line: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(line + "\n")
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        monkeypatch.setattr(resources, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(resources, "CGROUP_ROOT", tmp_path)

    return enter


@pytest.mark.parametrize(
    "line, files, room",
    [
        (
            "0::/a/b",
            {"a/memory.max": "5000", "a/memory.current": "4000", "a/memory.stat": "anon 9\ninactive_file 300"},
            1300,
        ),
        ("0::/a", {"a/memory.max": "max", "a/memory.current": "4000", "a/memory.stat": ""}, 10_000),
        ("0::/a", {"a/memory.max": "10", "a/memory.current": "4000", "a/memory.stat": ""}, 0),
        (
            "3:cpu:/x\n4:memory:/a",
            {
                "memory/a/memory.limit_in_bytes": "5000",
                "memory/a/memory.usage_in_bytes": "1000",
                "memory/a/memory.stat": "active_file 7",
            },
            4007,
        ),
        ("0::/gone", {}, 10_000),
    ],
)
def test_available_memory(container, monkeypatch, line, files, room):
    import psutil

    container(line, files)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10_000}))
    assert resources.available_memory() == room


@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/gone", {"cpu.max": "100000 100000"}, 1),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 64),
        ("1:memory:/a", {"cpu.max": "100000 100000"}, 64),
    ],
)
def test_cores_by_quota(container, monkeypatch, line, files, cores):
    container(line, files)
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert resources.num_cores() == cores
