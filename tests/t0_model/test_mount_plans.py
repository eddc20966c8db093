import pytest

from nsfs.errors import DeniedError, UsageError
from nsfs.model.mounts import Bind, Driver, Host, Overlay, choose_driver, plan_rootfs, unique_maps

ROOT = Host(root=True, erofs=True, file_backed=True)


@pytest.mark.parametrize(
    ("wish", "host", "driver"),
    [
        ("auto", ROOT, Driver.EROFS),
        ("auto", Host(root=True, erofs=True, file_backed=False), Driver.EROFS_LOOP),
        ("auto", Host(root=True, erofs=False, file_backed=False), Driver.FUSE),
        ("auto", Host(root=False, erofs=True, file_backed=True), Driver.FUSE),
        ("erofs-loop", ROOT, Driver.EROFS_LOOP),
        ("fuse", ROOT, Driver.FUSE),
    ],
)
def test_driver(wish: str, host: Host, driver: Driver) -> None:
    assert choose_driver(wish, host) is driver


@pytest.mark.parametrize(
    ("wish", "host", "error"),
    [
        ("erofs", Host(root=False, erofs=True, file_backed=True), DeniedError),
        ("erofs-loop", Host(root=False, erofs=True, file_backed=True), DeniedError),
        ("erofs", Host(root=True, erofs=True, file_backed=False), UsageError),
        ("erofs", Host(root=True, erofs=False, file_backed=False), UsageError),
        ("ext4", ROOT, UsageError),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_hint(wish: str, host: Host, error: type[UsageError]) -> None:
    with pytest.raises(error) as caught:
        choose_driver(wish, host)
    assert caught.value.hint


def test_a_map_that_occurs_twice_is_given_once_at_its_topmost_place() -> None:
    assert unique_maps(["c", "a", "b", "a", "a"]) == ["c", "a", "b"]


def test_one_view_without_marks_is_bound() -> None:
    assert plan_rootfs(["l/0"], marks=False, empty="e", upper=None) == Bind("l/0")


def test_marks_need_an_overlay_to_hide_them() -> None:
    assert plan_rootfs(["l/0"], marks=True, empty="e", upper=None) == Overlay(("l/0", "e"))


def test_several_views_are_stacked_top_first() -> None:
    assert plan_rootfs(["l/1", "l/0"], marks=False, empty="e", upper=None) == Overlay(("l/1", "l/0"))


def test_an_upper_goes_over_whatever_there_is() -> None:
    upper = ("u", "w")
    assert plan_rootfs(["l/0"], marks=False, empty="e", upper=upper) == Overlay(("l/0",), "u", "w")
    assert plan_rootfs([], marks=False, empty="e", upper=upper) == Overlay(("e",), "u", "w")


def test_an_image_without_layers_is_an_empty_directory() -> None:
    assert plan_rootfs([], marks=False, empty="e", upper=None) == Bind("e")
