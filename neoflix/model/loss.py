"""The causal language model's loss, with one [tokens, vocabulary] tensor where the textbook keeps four.

Hugging Face's loss copies the logits to fp32, keeps their log-softmax for the backward pass, and there makes two
more fp32 tensors of that size: at 2,048 tokens and 50,304 words 412 MB each, and all of them live when memory is at
its fullest. Here the logits are the only one. The forward pass reads them a few rows at a time and keeps one
log-sum-exp a token; the backward pass turns them, again a few rows at a time, into their own gradient, in place and
in their own dtype. All arithmetic is fp32, so that the figures are those of `torch.nn.functional.cross_entropy`.

The logits come from the model's own `lm_head`, whose weight is therefore whole where ZeRO-3 keeps it in pieces.

Shapes: N tokens, V words.
"""

import torch
from torch.nn.functional import pad

from neoflix.data.packing import IGNORE_INDEX

# Logits taken at a time. On a CPU 4 MB of fp32 stay in the cache: 11 ms for a log-sum-exp of 477 x 50,304 where all
# at once takes 17. A GPU wants few large kernels; 256 MB of fp32 are 1,334 tokens.
CPU_CHUNK, CUDA_CHUNK = 2**20, 2**26


class SummedCrossEntropy(torch.autograd.Function):
    """(logits [N, V], targets [N]) -> sum of -log softmax(logits)[target] over targets that are not IGNORE_INDEX, fp32.

    The backward pass overwrites `logits` with their gradient: they are spent then, and torch says so to
    whoever asks for a second backward pass.
    """

    @staticmethod
    def forward(ctx, logits_NV, targets_N):
        log_sum_exp_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
        for rows in _chunks(logits_NV):
            log_sum_exp_N[rows] = torch.logsumexp(logits_NV[rows].float(), dim=-1)
        ctx.save_for_backward(logits_NV, targets_N, log_sum_exp_N)
        target_logits_N = logits_NV.gather(1, targets_N.clamp(min=0).unsqueeze(1)).squeeze(1)
        return (log_sum_exp_N - target_logits_N).masked_fill(targets_N == IGNORE_INDEX, 0.0).sum()

    @staticmethod
    def backward(ctx, grad_output):
        logits_NV, targets_N, log_sum_exp_N = ctx.saved_tensors
        scale_N1 = (grad_output * (targets_N != IGNORE_INDEX)).unsqueeze(1)
        log_sum_exp_N1, targets_N1 = log_sum_exp_N.unsqueeze(1), targets_N.clamp(min=0).unsqueeze(1)
        for rows in _chunks(logits_NV):
            gradient = logits_NV[rows].float().sub_(log_sum_exp_N1[rows]).exp_()  # in fp32: the logits themselves
            gradient.scatter_add_(1, targets_N1[rows], gradient.new_full((len(gradient), 1), -1.0))
            logits_NV[rows] = gradient.mul_(scale_N1[rows])
        return logits_NV, None


def _chunks(logits_NV: torch.Tensor) -> list[slice]:
    num_rows = max(1, (CUDA_CHUNK if logits_NV.is_cuda else CPU_CHUNK) // logits_NV.shape[1])
    return [slice(start, start + num_rows) for start in range(0, len(logits_NV), num_rows)]


@torch.compiler.disable  # a compiler may not spend the logits: --torch_compile leaves the loss as it is
def causal_lm_loss(logits, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
    """Hugging Face's `ForCausalLMLoss`: a model takes it as its `loss_function`.

    Args:
        logits: [B, T, V]; after the backward pass they hold their gradient.
        labels: long [B, T]; token t's logits are held against label t + 1.
        num_items_in_batch: what the sum is divided by: labels of the whole step, over all ranks and
            accumulated batches. None: the labels of this batch, for the plain mean.
    """
    targets_N = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    loss = SummedCrossEntropy.apply(logits.flatten(0, 1), targets_N)
    return loss / ((targets_N != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)
