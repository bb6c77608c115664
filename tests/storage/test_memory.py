import psutil
import pytest

from maskft.errors import MaskftError
from maskft.storage import memory


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/a/b", {"memory.max": "1000", "memory.current": "300", "memory.stat": "anon 9\ninactive_file 50"}, [750]),
        ("0::/a/b", {"a/memory.max": "1000", "a/memory.current": "1200", "a/memory.stat": ""}, [0]),
        ("0::/a/b", {"a/b/memory.max": "max", "a/b/memory.current": "1", "a/b/memory.stat": ""}, []),
        (
            "5:memory:/x\n0::/",
            {"memory/memory.limit_in_bytes": "70", "memory/memory.usage_in_bytes": "20", "memory/memory.stat": ""},
            [50],
        ),
        ("", {}, []),
    ],
)
def test_the_limits_of_all_groups_above_a_process_count(tmp_path, groups, files, left) -> None:
    (tmp_path / "cgroup").write_text(groups)
    root = tmp_path / "root"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert memory._left_in_groups(tmp_path / "cgroup", (root, root / "memory")) == left
    assert memory._left_in_groups(tmp_path / "absent", (tmp_path / "absent",)) == []


def test_a_container_has_no_more_than_its_limit(monkeypatch) -> None:
    assert 0 < memory.free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "_left_in_groups", lambda *_: [5 * 10**8])
    with pytest.raises(MaskftError, match=r"a\.json needs up to 1\.0 GB of memory, and 0\.5 GB are free"):
        memory.require_memory(10**9, "a.json")
