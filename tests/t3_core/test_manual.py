"""Manual mounts: whatever is asked, fails, or is given up, exactly what the records need is mounted and shown."""

from functools import partial
from math import inf, nan
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from manual_fakes import FAIL, HANG, USER, Site
from nsfs.core.manual import Lowers, plan_phases
from nsfs.errors import BusyError, DeniedError, NotFoundError, NsfsError, UnreachableError, UsageError
from nsfs.model.mounts import Driver, Lower
from nsfs.model.report import Phases
from trio_tests import run


def test_a_mount_has_its_lowers_and_an_umount_takes_them() -> None:
    async def body() -> None:
        site = Site()
        record = await site.mount("/t", 2)
        site.check()
        assert sorted(path for path in site.kernel.mounted() if path != "/t") == ["/l/0", "/l/1", "/l/2"]
        assert record.maps == [f"{n:032x}" for n in (2, 1, 0)]
        await site.manual.umount("/t", force=False)
        site.check()
        assert site.kernel.mounted() == set()

    run(body)


def test_two_images_share_the_lowers_that_both_stack() -> None:
    async def body() -> None:
        site = Site()
        await site.mount("/a", 1)
        await site.mount("/b", 3)
        site.check()
        await site.manual.umount("/a", force=False)
        site.check()
        await site.mount("/c", 0)
        site.check()
        assert site.script.calls.count("ShowViews") == 2

    run(body)


@pytest.mark.parametrize("apart", [0, 0.01, 0.02, 0.03])
def test_many_who_mount_one_image_at_once_mount_its_views_once(apart: float) -> None:
    async def body() -> None:
        site = Site()

        async def mount(number: int) -> None:
            await trio.sleep(number * apart)
            await site.mount(f"/{number}", 2)
            await site.manual.umount(f"/{number}", force=False)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(mount, number)
        site.check()
        assert not site.kernel.mounted()

    run(body)


def test_one_view_under_two_drivers_is_shown_until_both_are_gone() -> None:
    async def body() -> None:
        site = Site()
        await site.mount("/a", 1, driver="erofs")
        await site.mount("/b", 1, driver="erofs-loop")
        await site.manual.umount("/a", force=False)
        site.check()
        site.script.faults["mount_lowers"] = [FAIL]
        with pytest.raises(UnreachableError):
            await site.mount("/a", 1, driver="erofs")
        site.check()

    run(body)


@pytest.mark.parametrize(
    "step", ["check_target", "Prepare", "ShowViews", "mount_lowers", "make_upper", "mount_rootfs", "put_mount"]
)
@pytest.mark.parametrize("isolation", ["shared", "pod"])
@pytest.mark.parametrize("fault", [FAIL, HANG])
def test_a_mount_that_fails_or_is_given_up_leaves_nothing(step: str, isolation: str, fault: str) -> None:
    async def body() -> None:
        site = Site()
        site.script.faults[step] = [fault]
        with trio.move_on_after(5):
            with pytest.raises(UnreachableError):
                await site.mount("/t", 2, isolation=isolation, writable=True)
            assert fault == FAIL or step == "put_mount"
        site.check()
        assert not site.records.known
        assert not site.kernel.mounted()
        await site.mount("/t", 2, isolation=isolation, writable=True)
        site.check()

    run(body)


@pytest.mark.parametrize("step", ["ShowTree", "mount_rootfs"])
@pytest.mark.parametrize("fault", [FAIL, HANG])
def test_a_tree_that_fails_or_is_given_up_leaves_nothing(step: str, fault: str) -> None:
    async def body() -> None:
        site = Site()
        site.script.faults[step] = [fault]
        with trio.move_on_after(5):
            with pytest.raises(UnreachableError):
                await site.mount(driver="fuse")
            assert fault == FAIL
        site.check()

    run(body)


@pytest.mark.parametrize("step", ["mount_front", "put_mount"])
def test_a_front_that_fails_leaves_nothing(step: str) -> None:
    async def body() -> None:
        site = Site(USER)
        site.script.faults[step] = [FAIL]
        with pytest.raises(UnreachableError):
            await site.mount(isolation=None)
        site.check()
        await site.mount(isolation=None)
        site.check()
        await site.manual.umount("/t", force=False)
        site.check()

    run(body)


def test_a_user_cannot_have_what_needs_root() -> None:
    async def body() -> None:
        site = Site(USER)
        with pytest.raises(DeniedError, match="writable"):
            await site.mount(writable=True, isolation=None)
        with pytest.raises(DeniedError, match="isolation"):
            await site.mount(isolation="pod")
        with pytest.raises(DeniedError, match="driver"):
            await site.mount(driver="erofs", isolation=None)
        assert site.script.calls == []

    run(body)


def test_one_target_is_mounted_once() -> None:
    async def body() -> None:
        site = Site()
        outcomes: list[str] = []

        async def mount() -> None:
            try:
                await site.mount("/t")
                outcomes.append("mounted")
            except BusyError:
                outcomes.append("busy")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(mount)
        assert sorted(outcomes) == ["busy", "busy", "mounted"]
        site.check()

    run(body)


def test_two_who_unmount_take_it_away_once() -> None:
    async def body() -> None:
        site = Site()
        await site.mount("/a", 1)
        await site.mount("/b", 1)
        outcomes: list[str] = []

        async def umount() -> None:
            try:
                await site.manual.umount("/a", force=False)
                outcomes.append("gone")
            except NotFoundError:
                outcomes.append("not found")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(umount)
            nursery.start_soon(umount)
            nursery.start_soon(site.manual.forget_gone)
        assert sorted(outcomes) == ["gone", "not found"]
        site.check()

    run(body)


def test_a_busy_mount_stays_as_it_is() -> None:
    async def body() -> None:
        site = Site()
        await site.mount()
        site.kernel.busy.add("/t")
        with pytest.raises(BusyError):
            await site.manual.umount("/t", force=False)
        site.check()
        await site.manual.umount("/t", force=True)
        site.check()

    run(body)


def test_nothing_is_recorded_that_could_not_be_kept() -> None:
    async def body() -> None:
        site = Site()
        for isolation, profile in (("pod", "record"), ("shared", "always")):
            with pytest.raises(UsageError):
                await site.mount(isolation=isolation, profile=profile)
        site.check()

    run(body)


def test_what_others_unmounted_is_given_up() -> None:
    async def body() -> None:
        site = Site()
        await site.mount("/a", 1, isolation="pod")
        await site.mount("/b", 2, writable=True)
        assert await site.manual.forget_gone() == 2
        for target in ("/a", "/b"):
            site.kernel.stacks[target].clear()
        assert await site.manual.forget_gone() == 0
        site.check()

    run(body)


def test_an_umount_once_begun_is_finished_without_its_caller() -> None:
    async def body() -> None:
        site = Site()
        await site.mount("/t", 2, isolation="pod", writable=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(site.manual.umount, "/t", force=False))
            await trio.sleep(0.015)
            nursery.cancel_scope.cancel()
        assert site.script.calls.count("unmount") == 2
        site.check()

    run(body)


def test_a_release_once_begun_is_finished_without_its_caller() -> None:
    async def body() -> None:
        site = Site()
        lowers = Lowers(site.kernel, site.workers, site.records)
        await lowers.acquire([Lower("ns/a", "view", Driver.EROFS)], "snapshot 1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lowers.release, "snapshot 1")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert site.kernel.mounted() == set()
        assert site.workers.shown == set()

    run(body)


def test_what_cannot_be_taken_away_is_logged_and_stands_in_nobodys_way(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        site = Site()
        await site.mount("/t", 1)
        site.script.faults["unmount"] = ["", FAIL]
        await site.manual.umount("/t", force=False)
        assert "unmount fails" in caplog.text
        left = site.kernel.mounted()
        assert left == {"/l/0", "/l/1"}
        await site.mount("/t", 1)
        assert site.kernel.mounted() - left == {"/l/2", "/l/3", "/t"}

    run(body)


def test_a_domain_whose_worker_hangs_holds_up_no_other() -> None:
    async def body() -> None:
        site = Site()
        site.script.faults["mount_lowers"] = [HANG]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(site.mount, "/a", isolation="isolated"))
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(1)
            begun = trio.current_time()
            await site.mount("/b")
            await site.manual.umount("/b", force=False)
            assert trio.current_time() - begun < 1
            nursery.cancel_scope.cancel()
        site.check()

    run(body)


def test_a_new_daemon_takes_away_what_the_dead_one_mounted(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        site = Site()
        await site.mount("/a", 1)
        await site.mount("/b", 2, isolation="pod", writable=True)
        await site.mount("/c", 1, driver="fuse")
        site.kernel.stacks["/c"].clear()
        site.restart()
        await site.manual.resume(())
        site.check()
        assert site.manual.records() == []
        assert caplog.text.count("took away") == 3

    run(body)


def test_a_pods_domain_of_which_nothing_is_mounted_ends_with_its_daemon() -> None:
    async def body() -> None:
        site = Site()
        mounted = await site.mount("/a", 1, isolation="pod")
        site.workers.pods |= {"pod/snapshot-7", "pod/pull-1"}
        await site.lowers.acquire([Lower("pod/snapshot-7", "0" * 32, Driver.EROFS)], "snapshot 7")
        site.follow()
        await site.manual.resume(("shared", mounted.domain, "pod/snapshot-7", "pod/pull-1"))
        assert site.workers.pods == {mounted.domain, "pod/snapshot-7"}

    run(body)


def test_a_dead_mount_that_stays_can_be_unmounted_later() -> None:
    async def body() -> None:
        site = Site()
        await site.mount("/a", 1)
        await site.mount("/b", 1)
        site.restart()
        site.script.faults["unmount"] = [FAIL]
        await site.manual.resume(())
        assert [record.target for record in site.manual.records()] == ["/a"]
        await site.mount("/b", 1)
        await site.manual.umount("/a", force=True)
        site.check()

    run(body)


def test_at_the_end_one_that_cannot_be_unmounted_keeps_no_other() -> None:
    async def body() -> None:
        site = Site()
        for target in ("/a", "/b", "/c"):
            await site.mount(target)
        site.script.faults["unmount"] = ["", "", FAIL]
        await site.manual.end_all()
        assert len(site.manual.records()) == 1
        site.check()

    run(body)


FORWARD = [
    "check_target",
    "Prepare",
    "ShowViews",
    "ShowTree",
    "mount_lowers",
    "make_upper",
    "mount_rootfs",
    "put_mount",
]
TARGETS = st.sampled_from(["/a", "/b", "/c"])
MOUNTS = st.builds(
    lambda target, image, isolation, driver, writable: (
        "mount",
        {"target": target, "image": image, "isolation": isolation, "driver": driver, "writable": writable},
    ),
    TARGETS,
    st.integers(0, 3),
    st.sampled_from(["shared", "shared", "isolated", "pod"]),
    st.sampled_from(["erofs", "erofs", "erofs-loop", "fuse"]),
    st.booleans(),
)
UMOUNTS = st.tuples(st.sampled_from(["umount", "vanish", "forget"]), TARGETS.map(lambda target: {"target": target}))
STEPS = st.lists(
    st.tuples(
        MOUNTS | UMOUNTS,
        st.integers(0, 12),  # hundredths of a second until it begins
        st.sampled_from([1, 2, 3, 5, 1000]),  # and until its caller gives up
    ),
    max_size=12,
)


@settings(max_examples=150)
@given(STEPS, st.lists(st.tuples(st.sampled_from(FORWARD), st.sampled_from([FAIL, HANG, ""])), max_size=8))
def test_any_calls_at_once_leave_what_the_records_need(steps: list[Any], faults: list[tuple[str, str]]) -> None:
    async def body() -> None:
        site = Site()
        for name, fault in faults:
            site.script.faults[name].append(fault)
        async with trio.open_nursery() as nursery:
            for step, begins, lasts in steps:
                nursery.start_soon(_do, site, step, begins / 100, lasts / 100)
        await site.manual.forget_gone()
        site.check()
        await site.manual.end_all()
        site.check()
        assert not site.kernel.mounted()

    run(body)


async def _do(site: Site, step: tuple[str, dict[str, Any]], begins: float, lasts: float) -> None:
    name, arguments = step
    await trio.sleep(begins)
    with trio.move_on_after(lasts):
        try:
            match name:
                case "mount":
                    await site.mount(**arguments)
                case "umount":
                    await site.manual.umount(arguments["target"], force=False)
                case "vanish":
                    site.kernel.stacks[arguments["target"]].clear()
                case "forget":
                    await site.manual.forget_gone()
        except NsfsError:
            pass


@pytest.mark.parametrize(("indexing", "index"), [(3.0, 3.0), (0.0, 0.0), (-1.0, 0.0), (inf, 5.0), (nan, 0.0)])
def test_a_mount_says_what_it_spent_its_time_with_whatever_its_worker_says(indexing: float, index: float) -> None:
    phases = plan_phases(1.0, 6.0, 8.0, indexing)
    assert phases == Phases(resolve=5.0 - index, index=index, mount=2.0)
