from collections.abc import Callable

OVERREAD_BYTES: int  # with CUDA only
SPMM_SM90_TILES: tuple[tuple[int, int, int, int], ...]  # rows of W, tokens, cluster, segments

class SpmmProblem:
    rows: int
    columns: int
    tokens: int
    device: int
    bfloat16: bool
    bias: bool
    accumulate: bool
    def __init__(
        self,
        *,
        rows: int,
        columns: int,
        tokens: int,
        device: int,
        bfloat16: bool,
        bias: bool = False,
        accumulate: bool = False,
    ) -> None: ...

class SpmmAlgorithm:
    id: int
    split_k: int
    split_k_mode: int
    def __init__(self, id: int = 0, split_k: int = 1, split_k_mode: int = 0) -> None: ...

class SpmmPlan:
    workspace_bytes: int
    algorithm_count: int
    def __init__(self, problem: SpmmProblem, algorithm: SpmmAlgorithm) -> None: ...
    def run(self, packed: int, x: int, bias: int, y: int, workspace: int, stream: int) -> None: ...

def build_info() -> dict[str, str]: ...
def connect(address: int | None) -> None: ...
def cusparselt_version() -> tuple[int, int, int]: ...
def driver_version() -> int: ...
def metadata_writer(device: int) -> int: ...
def native_forget() -> None: ...
def native_runs(device: int) -> bool: ...
def native_set_loader(loader: Callable[[int], object]) -> None: ...
def native_tuned(
    *,
    device: int,
    bfloat16: bool,
    tokens: int,
    rows: int,
    columns: int,
    choice: tuple[int, int, int],
) -> bool: ...
def plan_cache_clear() -> None: ...
def plan_cache_entries() -> list[tuple[SpmmProblem, SpmmAlgorithm, int]]: ...
def plan_cache_info() -> dict[str, int]: ...
def plan_cache_set_capacity(plans: int) -> None: ...
def plan_cache_set_chooser(
    chooser: Callable[[SpmmProblem, bool], SpmmAlgorithm],
) -> None: ...
def spmm_sm90_candidates(
    tokens: int, rows: int, columns: int, *, processors: int, clusters: list[int], factor: float
) -> list[tuple[int, int, int]]: ...
def spmm_sm90_choice(
    tokens: int, rows: int, columns: int, *, processors: int, clusters: list[int]
) -> tuple[int, int, int]: ...
def spmm_sm90_cut(
    tile: int, tokens: int, rows: int, columns: int, *, processors: int, clusters: list[int]
) -> tuple[bool, float]: ...
