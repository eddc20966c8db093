"""What a kubelet asks of containerd about images, pods and containers, over the CRI (k8s.io/cri-api, runtime.v1).

Owns a channel to one containerd. Pods are in the host's network: that needs no CNI plugins. `make proto` makes the
messages of cri_api.proto.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Self

import grpc

import cri_api_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_DEADLINE = 60.0
"""Seconds for one call."""


class Cri:
    """The image and the runtime service of the containerd at a socket."""

    def __init__(self, socket: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.enable_http_proxy", 0)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    # Images

    def pull(self, reference: str, handler: str = "") -> str:
        """PullImage, for pods of a runtime handler; gives the image's ID, which is its configuration's digest."""
        config = pb.PodSandboxConfig(annotations=_handled(handler))
        request = pb.PullImageRequest(image=pb.ImageSpec(image=reference), sandbox_config=config)
        pulled: str = self._ask("ImageService/PullImage", request, pb.PullImageResponse).image_ref
        return pulled

    def remove_image(self, reference: str) -> None:
        """RemoveImage."""
        request = pb.RemoveImageRequest(image=pb.ImageSpec(image=reference))
        self._ask("ImageService/RemoveImage", request, pb.RemoveImageResponse)

    def names(self) -> set[str]:
        """The tags of ListImages."""
        listed = self._ask("ImageService/ListImages", pb.ListImagesRequest(), pb.ListImagesResponse).images
        return {tag for image in listed for tag in image.repo_tags}

    def wait_for(self, reference: str) -> None:
        """Until it is listed: the CRI hears of images by events."""
        deadline = time.monotonic() + 60
        while reference not in self.names():
            assert time.monotonic() < deadline, self.names()
            time.sleep(0.05)

    # Pods and their containers

    @contextlib.contextmanager
    def pod(self, name: str, logs: str, handler: str = "") -> Iterator[Pod]:
        """A pod that runs, with its containers' logs in a directory; stopped and removed with the block."""
        network = pb.LinuxSandboxSecurityContext(namespace_options=_HOST_NETWORK)
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=name, namespace="default"),
            log_directory=logs,
            annotations=_handled(handler),
            linux=pb.LinuxPodSandboxConfig(security_context=network),
        )
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        sandbox = self._ask("RuntimeService/RunPodSandbox", request, pb.RunPodSandboxResponse).pod_sandbox_id
        try:
            yield Pod(self, sandbox, config)
        finally:
            by_id = {"pod_sandbox_id": sandbox}
            self._ask("RuntimeService/StopPodSandbox", pb.StopPodSandboxRequest(**by_id), pb.StopPodSandboxResponse)
            removed = pb.RemovePodSandboxRequest(**by_id)
            self._ask("RuntimeService/RemovePodSandbox", removed, pb.RemovePodSandboxResponse)

    def _ask(self, method: str, request: Any, answer: Any) -> Any:
        serialize = type(request).SerializeToString
        call = self._channel.unary_unary(f"/runtime.v1.{method}", serialize, answer.FromString)
        return call(request, timeout=_DEADLINE)


class Pod:
    """A sandbox, in which containers start."""

    def __init__(self, cri: Cri, sandbox: str, config: pb.PodSandboxConfig) -> None:
        self._cri = cri
        self._sandbox = sandbox
        self._config = config

    def start(self, reference: str, name: str, *command: str) -> str:
        """CreateContainer and StartContainer; gives the container's ID."""
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=reference),
            command=command,
            log_path=name,
            linux=pb.LinuxContainerConfig(
                security_context=pb.LinuxContainerSecurityContext(namespace_options=_HOST_NETWORK)
            ),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=self._sandbox, config=config, sandbox_config=self._config)
        made: str = self._cri._ask("RuntimeService/CreateContainer", request, pb.CreateContainerResponse).container_id
        started = pb.StartContainerRequest(container_id=made)
        self._cri._ask("RuntimeService/StartContainer", started, pb.StartContainerResponse)
        return made

    def log(self, name: str) -> str:
        """What a container has said on stdout."""
        with open(f"{self._config.log_directory}/{name}") as file:
            lines = [line.split(" ", 3) for line in file]
        return "".join(text for _, stream, _, text in lines if stream == "stdout")

    def ask(self, container: str, *command: str) -> str:
        """ExecSync: what a command prints in a container that runs."""
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=30)
        said = self._cri._ask("RuntimeService/ExecSync", request, pb.ExecSyncResponse)
        assert said.exit_code == 0, said.stderr
        output: bytes = said.stdout
        return output.decode()


def _handled(handler: str) -> dict[str, str]:
    """By which containerd 1.7 to 2.2 find a runtime handler's snapshotter when they pull (docs/cri/config.md)."""
    return {"io.containerd.cri.runtime-handler": handler} if handler else {}


_HOST_NETWORK = pb.NamespaceOption(network=pb.NODE)
