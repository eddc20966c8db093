from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import DeniedError, UsageError
from nsfs.model.policy import (
    Domain,
    Isolation,
    Patience,
    Policy,
    Rule,
    ScopeRequest,
    check_owner,
    check_rule,
    decide_scope,
    own_domain,
    own_domains,
    owner_name,
    owner_of,
    parse_patience,
    parse_trust,
    parse_view_name,
    repository_of,
    resolve_private_domain,
    view_name,
)

PYTHON = "docker.io/library/python:3.12"
APP = "registry.example:5000/team-a/app:1@sha256:00"
PUBLIC = Rule(scope=Isolation.SHARED, domain="public", image="docker.io/library/*", name="base images")
PODS = Rule(scope=Isolation.POD, namespace="build-*")
POLICY = Policy(Isolation.ISOLATED, (PUBLIC, PODS))


def ask(namespace: str = "team-a", *references: str, **more: Any) -> ScopeRequest:
    return ScopeRequest(namespace=namespace, references=references or (PYTHON,), mount_id="m1", **more)


def domain_of(policy: Policy, request: ScopeRequest) -> str | None:
    domain = decide_scope(policy, request).domain
    return domain.name if domain else None


@pytest.mark.parametrize(
    ("wish", "default", "name", "transient"),
    [
        ("shared", Isolation.ISOLATED, "shared", False),
        ("isolated", Isolation.SHARED, "ns/team-a", False),
        ("pod", Isolation.SHARED, "pod/m1", True),
        (None, Isolation.ISOLATED, "ns/team-a", False),
        (None, Isolation.SHARED, "shared", False),
    ],
)
def test_scope_decides_the_domain(wish: str | None, default: Isolation, name: str, transient: bool) -> None:
    domain = decide_scope(Policy(default), ask(wish=wish)).on_host()
    assert (domain.name, domain.transient) == (name, transient)


def test_a_guest_has_no_domain_on_the_host() -> None:
    decision = decide_scope(Policy(), ask(wish="guest"))
    assert decision.domain is None
    with pytest.raises(DeniedError, match="nothing of this image may be on the host: --isolation"):
        decision.on_host()


@pytest.mark.parametrize("namespace", ["", "a/b", "..", "a..b", "-a", "a" * 77, "a b", "ns\n", "ä", "a\x00"])
def test_odd_namespaces_are_refused(namespace: str) -> None:
    with pytest.raises(UsageError, match="not a namespace"):
        decide_scope(Policy(), ask(namespace))


@pytest.mark.parametrize("part", ["wish", "label"])
def test_unknown_isolation_is_refused_with_the_choices(part: str) -> None:
    with pytest.raises(UsageError) as caught:
        decide_scope(Policy(), ask(**{part: "public"}))
    assert caught.value.hint == "one of shared, isolated, pod, guest"


@pytest.mark.parametrize(
    ("request_", "domain", "rule"),
    [
        (ask(), "public", "rule 1 (base images)"),
        (ask("build-7"), "public", "rule 1 (base images)"),
        (ask("build-7", APP), "pod/m1", "rule 2"),
        (ask("team-a", APP), "ns/team-a", "the configuration's isolation"),
        (ask("team-a", "docker.io/library/a/b"), "ns/team-a", "the configuration's isolation"),
        (ask("team-a", "evil.example/docker.io/library/python"), "ns/team-a", "the configuration's isolation"),
    ],
)
def test_the_first_rule_that_matches_decides(request_: ScopeRequest, domain: str, rule: str) -> None:
    assert domain_of(POLICY, request_) == domain
    assert decide_scope(POLICY, request_).rule == rule


@pytest.mark.parametrize(
    ("plugin", "reference", "domain"),
    [
        ("nsfs", APP, "ns/k8s.io"),
        ("lazy", APP, "ns/k8s.io"),
        ("nsfs-shared", APP, "shared"),
        ("nsfs-isolated", APP, "ns/k8s.io"),
        ("nsfs-guest", APP, None),
        ("nsfs-pod", PYTHON, "pod/m1"),
        ("nsfs-isolated", PYTHON, "ns/k8s.io"),
        ("nsfs-shared", PYTHON, "public"),
        ("nsfs-team-a", APP, "ns/k8s.io/team-a"),
        ("nsfs-team-b", APP, "ns/k8s.io/team-b"),
        ("nsfs-team-a", PYTHON, "public"),
    ],
)
def test_plugin_names_say_a_scope_or_a_tenant(plugin: str, reference: str, domain: str | None) -> None:
    assert domain_of(POLICY, ask("k8s.io", reference, plugin=plugin)) == domain


def test_a_tenant_is_isolated_where_sharing_is_the_default() -> None:
    assert domain_of(Policy(Isolation.SHARED), ask(plugin="nsfs-team-a")) == "ns/team-a/team-a"


def test_a_rule_may_forbid_what_a_plugin_name_says() -> None:
    policy = Policy(Isolation.ISOLATED, (Rule(scope=Isolation.ISOLATED, plugin="nsfs-shared", namespace="team-*"),))
    assert domain_of(policy, ask(plugin="nsfs-shared")) == "ns/team-a"
    assert domain_of(policy, ask("infra", plugin="nsfs-shared")) == "shared"


@pytest.mark.parametrize("plugin", ["nsfs-", "nsfs-a/b", "nsfs-..", "nsfs-" + "a" * 77])
def test_odd_tenants_are_refused(plugin: str) -> None:
    with pytest.raises(UsageError, match="not a tenant"):
        decide_scope(POLICY, ask(plugin=plugin))


def test_root_may_choose_what_the_policy_does_not() -> None:
    assert domain_of(POLICY, ask("team-a", APP, wish="shared")) == "shared"
    assert domain_of(POLICY, ask("team-a", PYTHON, wish="shared")) == "public"
    assert domain_of(POLICY, ask("team-a", PYTHON, wish="isolated")) == "ns/team-a"


def test_layers_of_several_images_get_what_is_right_for_all() -> None:
    assert domain_of(POLICY, ask("team-a", PYTHON, "docker.io/library/debian")) == "public"
    assert domain_of(POLICY, ask("team-a", PYTHON, APP)) == "ns/team-a"
    assert domain_of(POLICY, ask("team-a", APP, PYTHON)) == "ns/team-a"
    two = Policy(Isolation.SHARED, (PUBLIC,))
    decision = decide_scope(two, ask("team-a", PYTHON, APP))
    assert decision.scope is Isolation.ISOLATED
    assert decision.rule == "layers of images that do not share one domain"


def test_a_label_tightens_and_cannot_loosen() -> None:
    assert domain_of(POLICY, ask(label="isolated")) == "ns/team-a"
    assert domain_of(POLICY, ask(label="guest")) is None
    assert domain_of(POLICY, ask(label="shared")) == "public"
    with pytest.raises(DeniedError, match="a label cannot loosen what is decided: shared instead of isolated"):
        decide_scope(POLICY, ask("team-a", APP, label="shared"))


_PATTERNS = st.sampled_from(["**", "*", "team-*", "docker.io/library/*", "docker.io/**", "registry.example:5000/**"])
_SCOPES = st.sampled_from(Isolation)
_RULES = st.builds(
    Rule,
    scope=_SCOPES,
    domain=st.just(""),
    namespace=_PATTERNS,
    image=_PATTERNS,
    plugin=st.sampled_from(["**", "nsfs-*"]),
)
_POLICIES = st.builds(Policy, _SCOPES, st.lists(_RULES, max_size=4).map(tuple))
_REFERENCES = st.sampled_from([PYTHON, APP, "docker.io/library/debian", "oci:/srv/images:x"])
_REQUESTS = st.builds(
    ScopeRequest,
    namespace=st.sampled_from(["team-a", "k8s.io"]),
    references=st.lists(_REFERENCES, min_size=1, max_size=3).map(tuple),
    plugin=st.sampled_from(["", "nsfs", "nsfs-team-a", *(f"nsfs-{scope}" for scope in Isolation)]),
    mount_id=st.just("m1"),
)


@given(_POLICIES, _REQUESTS, _SCOPES)
def test_no_label_ever_loosens(policy: Policy, request: ScopeRequest, label: Isolation) -> None:
    before = decide_scope(policy, request)
    try:
        after = decide_scope(policy, replace(request, label=label))
    except DeniedError:
        assert before.scope.is_tighter(label)
        return
    assert not before.scope.is_tighter(after.scope)
    assert after.scope is max(before.scope, label, key=list(Isolation).index)


@given(_POLICIES, _REQUESTS, _REFERENCES)
def test_standing_on_another_image_never_loosens(policy: Policy, request: ScopeRequest, other: str) -> None:
    before = decide_scope(policy, request)
    after = decide_scope(policy, replace(request, references=(*request.references, other)))
    assert not before.scope.is_tighter(after.scope)


@given(_POLICIES, _REQUESTS)
def test_scope_plugin_names_are_never_loosened(policy: Policy, request: ScopeRequest) -> None:
    decision = decide_scope(policy, replace(request, plugin="nsfs-isolated"))
    assert decision.scope is not Isolation.SHARED


@given(_POLICIES, _REQUESTS)
def test_isolated_domains_are_the_namespaces_and_tenants_own(policy: Policy, request: ScopeRequest) -> None:
    decision = decide_scope(policy, request)
    tenant = "/team-a" if request.plugin == "nsfs-team-a" else ""
    names = {
        Isolation.SHARED: "shared",
        Isolation.ISOLATED: f"ns/{request.namespace}{tenant}",
        Isolation.POD: "pod/m1",
        Isolation.GUEST: None,
    }
    assert (decision.domain and decision.domain.name) == names[decision.scope]
    assert decision.rule
    assert decision.reasons


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(scope=Isolation.ISOLATED, domain="public"), "only a shared scope has a domain of a name: public"),
        (Rule(scope=Isolation.SHARED, domain="ns/team-b"), "not a domain: 'ns/team-b'"),
        (Rule(scope=Isolation.SHARED, image="docker.io/library/python:3"), "an image pattern with a tag or a digest"),
        (Rule(scope=Isolation.SHARED, image="docker.io/**@sha256:0"), "an image pattern with a tag or a digest"),
    ],
)
def test_rules_that_could_not_do_what_they_say_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_rule(rule)


@pytest.mark.parametrize(
    ("reference", "repository"),
    [
        (PYTHON, "docker.io/library/python"),
        (APP, "registry.example:5000/team-a/app"),
        ("localhost:5000/x", "localhost:5000/x"),
        ("oci:/srv/images:tag", "oci:/srv/images"),
        ("oci:/srv/images", "oci:/srv/images"),
    ],
)
def test_repository_of(reference: str, repository: str) -> None:
    assert repository_of(reference) == repository


def test_a_namespaces_domains_are_its_own_and_its_tenants() -> None:
    domains = ["shared", "ns/a", "ns/a/t", "ns/ab", "pod/a", "a"]
    assert own_domains("a", domains) == ["ns/a", "ns/a/t"]


@pytest.mark.parametrize("wish", ["isolated", "pod"])
def test_users_who_are_not_root_have_one_domain(wish: str) -> None:
    assert resolve_private_domain(None) == resolve_private_domain("shared")
    with pytest.raises(DeniedError, match="isolation needs root"):
        resolve_private_domain(wish)


@pytest.mark.parametrize(("text", "seconds"), [("wait", None), ("wait:60s", 60), ("wait:5", 5), ("eio", 0)])
def test_patience(text: str, seconds: float | None) -> None:
    assert parse_patience(text) == Patience(seconds)


@pytest.mark.parametrize("text", ["", "wait:", "wait:-1s", "wait:1.5s", "EIO", "never"])
def test_other_patience_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an on-error choice"):
        parse_patience(text)


@given(
    st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    st.none() | st.integers(0, 999_999),
    st.sampled_from(["", "team-a", "k8s.io", "k8s.io/team_a", "a_b/c"]),
    st.sampled_from(["", "0123abcd", "00000060"]),
)
def test_view_names_carry_map_patience_reader_and_recording(
    map_id: str, seconds: int | None, reader: str, recording: str
) -> None:
    patience = Patience(seconds)
    name = view_name(map_id, patience.suffix, reader, recording)
    assert parse_view_name(name) == (map_id, patience, reader, recording)
    assert quote(name, safe="") == name


@given(st.text(max_size=60))
def test_no_other_text_is_a_view_name(text: str) -> None:
    try:
        found = parse_view_name(text)
    except UsageError:
        return
    assert parse_view_name(view_name(found.map_id, found.patience.suffix, found.reader, found.recording)) == found


@pytest.mark.parametrize("plugin", ["", "nsfs", "nsfs-gold"])
@pytest.mark.parametrize("wish", ["isolated", "pod", "shared"])
def test_a_domain_says_on_whose_behalf(plugin: str, wish: str) -> None:
    domain = decide_scope(POLICY, ask(plugin=plugin, wish=wish)).on_host()
    owner = owner_name("team-a", "gold" if plugin == "nsfs-gold" else "")
    assert domain.owner == check_owner(owner)
    assert owner_of(domain) == ("" if wish == "shared" else owner)
    if wish == "isolated":
        assert domain.name == own_domain(owner)
        assert owner_of(Domain(domain.name, Isolation.SHARED)) == owner


@pytest.mark.parametrize("text", ["", "/a", "a/", "a/b/c", "../a", "a/..", "a b"])
def test_what_cannot_own_anything(text: str) -> None:
    with pytest.raises(UsageError):
        check_owner(text)


PINNED = "sha256:" + "a" * 64
TRUSTING = Policy(
    Isolation.ISOLATED,
    (
        Rule(scope=Isolation.SHARED, image="docker.io/library/*", trust_index=PINNED),
        Rule(scope=Isolation.SHARED, image="docker.io/other/*"),
        Rule(scope=Isolation.ISOLATED, image="registry.example:5000/team-b/*", trust_index="off"),
    ),
    "same-repository",
)


@pytest.mark.parametrize(
    ("references", "wish", "trust"),
    [
        ((APP,), None, "same-repository"),
        ((APP,), "pod", "same-repository"),
        ((APP,), "shared", "off"),
        ((PYTHON,), None, PINNED),
        ((PYTHON,), "isolated", PINNED),
        (("docker.io/other/thing:1",), None, "off"),
        (("registry.example:5000/team-b/app:1",), None, "off"),
        ((PYTHON, "docker.io/other/thing:1"), None, "off"),
        ((PYTHON, PYTHON), None, PINNED),
    ],
)
def test_what_lies_beside_an_image_is_believed_among_tenants_where_a_rule_says_so_alone(
    references: tuple[str, ...], wish: str | None, trust: str
) -> None:
    assert decide_scope(TRUSTING, ask("team-a", *references, wish=wish)).on_host().trust_index == trust
    assert decide_scope(POLICY, ask("team-a", *references, wish=wish)).on_host().trust_index == "off"


@pytest.mark.parametrize("text", ["", "on", "same-repo", "sha256:a", "SAME-REPOSITORY"])
def test_what_is_no_trust(text: str) -> None:
    with pytest.raises(UsageError):
        parse_trust(text)
    if text:
        with pytest.raises(UsageError):
            check_rule(Rule(scope=Isolation.POD, trust_index=text))
