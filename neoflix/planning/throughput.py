"""FLOPs of training, and the peak FLOP/s of devices.

A multiplication and an addition are 2 FLOP. Imports no torch.
"""

# Peak of dense bf16 products with fp32 sums (fp16 on Volta and Turing), in TFLOP/s, by the name that the driver gives
# the device, without "NVIDIA". Names are matched whole: "RTX A1000" is not an A100, and a laptop's GPU is not the
# desktop's. Sources: NVIDIA's data sheets; for GeForce the architecture papers (GA102, Ada, Blackwell), "FP16 tensor
# TFLOPS with FP32 accumulate". Sparse figures are halved.
PEAK_TFLOPS = {
    **dict.fromkeys(("H200", "H100 80GB HBM3", "H100 SXM5 80GB", "H800"), 989),
    **dict.fromkeys(("GH200 480GB", "GH200 120GB", "GH200 144G HBM3e"), 989),
    **dict.fromkeys(("H200 NVL", "H100 NVL"), 835),
    "H100 PCIe": 756,
    **dict.fromkeys(("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-SXM-64GB", "A100-SXM-80GB"), 312),
    **dict.fromkeys(("A100-PCIE-40GB", "A100-PCIE-80GB", "A100 80GB PCIe", "A100-PG509-200"), 312),
    **dict.fromkeys(("A800-SXM4-80GB", "A800-SXM4-40GB", "A800 80GB PCIe", "A800-PCIE-80GB"), 312),
    "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A30": 165, "A10": 125, "A10G": 70,
    "RTX 6000 Ada Generation": 364, "RTX 5000 Ada Generation": 261,
    "RTX A6000": 155, "RTX A5000": 111, "RTX A4000": 77,
    "GeForce RTX 5090": 210, "GeForce RTX 5080": 113, "GeForce RTX 4090": 165, "GeForce RTX 4080": 97,
    "GeForce RTX 3090 Ti": 80, "GeForce RTX 3090": 71, "GeForce RTX 3080": 60,
    **dict.fromkeys(("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB"), 125),
    **dict.fromkeys(("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"), 112),
    "Tesla V100S-PCIE-32GB": 130, "Tesla T4": 65,
}  # fmt: skip

# Products reach 0.165 TFLOP/s a core, and are 0.49 of a step's time (benchmarks/results/train-cpu.jsonl, two Xeon
# cores).
CPU_CORE_FLOPS = 0.165e12 * 0.49
# LoRA of architectures other than GPT-Neo takes so many times the time of its FLOP there: many small products. Measured
# with SmolLM2-135M, rank 16 (docs/speed.md).
SMALL_PRODUCTS = 1.35
MOST_CPU_CORES = 64  # training does not use more


def peak_flops(device_name: str, weight_bytes: int) -> float | None:
    """Peak FLOP/s of one GPU, or None if it is not known.

    There is no figure for fp32: it depends on whether torch rounds products to TF32.
    """
    rate = PEAK_TFLOPS.get(device_name.removeprefix("NVIDIA ")) if weight_bytes == 2 else None
    return rate and rate * 1e12


def cpu_flops(num_cores: int) -> float:
    """FLOP/s of training on CPU cores."""
    return CPU_CORE_FLOPS * min(num_cores, MOST_CPU_CORES)


def flops_per_token(num_weights: int, num_layers: int, width: int, mean_length: float, is_lora: bool = False) -> float:
    """FLOP of a training step per token, without recomputed activations.

    Each weight takes part in three products a token: forward, and backward for the gradients of its input and its own.
    A frozen weight (LoRA) needs no gradient of its own. Causal attention over texts of `mean_length` tokens takes
    `mean_length * width` FLOP each for scores and values, and twice that backward. Source: Chowdhery et al., "PaLM",
    2022, appendix B.

    Args:
        num_weights: weights that a token is multiplied with, including the output layer.
    """
    return (4 if is_lora else 6) * num_weights + 6 * num_layers * width * mean_length


def recomputed_flops_per_token(num_weights: int, num_layers: int, width: int, mean_length: float) -> float:
    """FLOP that activation checkpointing adds per token: a second forward pass."""
    return 2 * num_weights + 2 * num_layers * width * mean_length
