"""What a pull plans: labels within containerd's limits, documents with what garbage collection follows."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from images import OCI_INDEX, OCI_MANIFEST, TAR_GZIP, Image, file, gzip_layer, image_index, tar_layer
from nsfs.model import oci
from nsfs.model.digest import ChainId, Digest, chain_ids
from nsfs.model.pull import MAX_LABEL, PullPlan, plan_labels, plan_pull, plan_snapshot_labels

BASE, TOP = gzip_layer([file("a", b"a")]), tar_layer([file("b", b"b")])
IMAGE = Image((BASE, TOP, BASE))
MANIFEST = oci.Document(IMAGE.manifest, OCI_MANIFEST, IMAGE.digest)
LAYERS = "containerd.io/snapshot/cri.image-layers"


def plan(*documents: oci.Document, host: str = "registry.example:5000") -> PullPlan:
    return plan_pull(f"{host}/app:1", host, "team/app", "nsfs", documents, IMAGE.config_blob)


def test_an_index_a_manifest_and_a_configuration_hold_each_other() -> None:
    index_data = image_index([IMAGE, Image((TOP,), architecture="arm64")])
    index = oci.Document(index_data, OCI_INDEX, Digest.of(index_data))
    planned = plan(index, MANIFEST)
    (first, _), (second, data), (config, _) = planned.documents
    assert first.labels == {
        "containerd.io/distribution.source.registry.example": "team/app",
        "containerd.io/gc.ref.content.m.0": IMAGE.digest,
        "containerd.io/gc.ref.content.m.1": Image((TOP,), architecture="arm64").digest,
    }
    assert second.labels == {
        "containerd.io/distribution.source.registry.example": "team/app",
        "containerd.io/gc.ref.content.config": config.digest,
        "containerd.io/gc.ref.content.l.0": BASE.digest,
        "containerd.io/gc.ref.content.l.1": TOP.digest,
        "containerd.io/gc.ref.content.l.2": BASE.digest,
    }
    assert (second.ref, data) == (f"manifest-{IMAGE.digest}", IMAGE.manifest)
    assert planned.target == oci.Descriptor(media_type=OCI_INDEX, digest=index.digest, size=len(index_data))


def test_layers_stand_on_each_other() -> None:
    planned = plan(MANIFEST)
    chains = chain_ids([layer.diff_id for layer in planned.layers])
    assert [layer.chain for layer in planned.layers] == chains
    assert [layer.parent for layer in planned.layers] == ["", *chains[:-1]]
    assert planned.config_labels == {"containerd.io/gc.ref.snapshot.nsfs": chains[-1]}
    assert planned.layers[1].labels == {
        "containerd.io/snapshot.ref": chains[1],
        "containerd.io/snapshot/cri.image-ref": "registry.example:5000/app:1",
        "containerd.io/snapshot/cri.layer-digest": TOP.digest,
        "containerd.io/snapshot/cri.manifest-digest": IMAGE.digest,
        LAYERS: f"{TOP.digest},{BASE.digest}",
    }


def test_an_image_without_layers_needs_no_snapshot() -> None:
    empty = Image(())
    planned = plan_pull("r/e:1", "r", "e", "nsfs", [oci.Document(empty.manifest, "", empty.digest)], empty.config_blob)
    assert (planned.layers, planned.config_labels) == ((), {})
    assert planned.target.media_type == OCI_MANIFEST


def test_hosts_lose_their_port() -> None:
    for host, bare in (("[::1]:5000", "[::1]"), ("docker.io", "docker.io"), ("127.0.0.1:80", "127.0.0.1")):
        (content, _), *_ = plan(MANIFEST, host=host).documents
        assert content.labels[f"containerd.io/distribution.source.{bare}"] == "team/app"


def test_artifacts_in_an_image_hold_by_other_labels() -> None:
    manifest = json.loads(IMAGE.manifest)
    manifest["layers"][1]["mediaType"] = "application/vnd.example.thing"
    data = json.dumps(manifest).encode()
    ((content, _), *_) = plan(oci.Document(data, OCI_MANIFEST, Digest.of(data))).documents
    assert content.labels["containerd.io/gc.ref.content.0"] == TOP.digest
    assert content.labels["containerd.io/gc.ref.content.l.1"] == BASE.digest


labels = st.dictionaries(
    st.one_of(
        st.sampled_from([LAYERS, "containerd.io/snapshot.ref", "containerd.io/snapshot/cri.layer-digest", "other"]),
        st.text(max_size=9).map(lambda name: "containerd.io/snapshot/" + name),
    ),
    st.one_of(st.text(max_size=9), st.integers(4000, 5000).map(lambda size: "x" * size)),
)


@given(labels, st.integers(1, 130))
def test_labels_fit_and_ours_win(annotations: dict[str, str], count: int) -> None:
    layers = [
        oci.Descriptor(media_type=TAR_GZIP, digest=Digest.of(b"%d" % number), size=1, annotations=annotations)
        for number in range(count)
    ]
    chain = ChainId(Digest.of(b"chain"))
    given_labels = plan_snapshot_labels("r/app:1", IMAGE.digest, layers, chain)
    assert all(len(key.encode()) + len(value.encode()) <= MAX_LABEL for key, value in given_labels.items())
    assert all(key.startswith("containerd.io/snapshot") for key in given_labels)
    assert given_labels["containerd.io/snapshot.ref"] == chain
    assert given_labels["containerd.io/snapshot/cri.layer-digest"] == layers[0].digest
    listed = given_labels[LAYERS].split(",")
    assert listed == [layer.digest for layer in layers[: len(listed)]]
    assert len(listed) == min(count, (MAX_LABEL - len(LAYERS) + 1) // 72)


def test_an_image_name_too_long_for_a_label_is_not_told() -> None:
    layer = oci.Descriptor(media_type=TAR_GZIP, digest=BASE.digest, size=1)
    told = plan_snapshot_labels("r/" + "a" * 4096, IMAGE.digest, [layer], ChainId(Digest.of(b"chain")))
    assert "containerd.io/snapshot/cri.image-ref" not in told


def test_a_blob_that_is_there_keeps_its_other_sources() -> None:
    source = "containerd.io/distribution.source.r"
    wanted = {source: "b", "containerd.io/gc.ref.content.config": "sha256:1"}
    assert plan_labels(wanted, {}) == wanted
    assert plan_labels(wanted, {source: "a,c", "x": "y"}) == wanted | {source: "a,b,c"}
    assert plan_labels(wanted, {source: "a,b", "containerd.io/gc.ref.content.config": "sha256:1"}) == {}
