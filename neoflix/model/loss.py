"""The loss of a causal language model, with one tensor [tokens, vocabulary] in memory instead of four.

Hugging Face's loss copies the logits to fp32, saves their log-softmax for the backward pass, and creates two more fp32
tensors of that size there: 412 MB each at 2,048 tokens and a vocabulary of 50,304, all at the peak of memory. Here the
logits are the only such tensor. The forward pass reads a chunk of rows at a time and saves one log-sum-exp per token.
The backward pass replaces the logits with their gradient, in place and in their dtype, again in chunks. All arithmetic
is in fp32, so the values are those of `torch.nn.functional.cross_entropy`.

The model's own `lm_head` computes the logits, so that ZeRO-3 gathers its weight as usual.

Shapes: N tokens, V vocabulary.
"""

import torch
from torch.nn.functional import pad

from neoflix.data.packing import IGNORE_INDEX

# Logits per chunk. On a CPU, 4 MB of fp32 stay in the cache: a log-sum-exp of 477 x 50,304 takes 11 ms, and 17 ms
# without chunks. A GPU is fastest with few large kernels: 256 MB of fp32 are 1,334 tokens.
CPU_CHUNK, CUDA_CHUNK = 2**20, 2**26


class SummedCrossEntropy(torch.autograd.Function):
    """(logits [N, V], targets [N]) -> sum of -log softmax(logits)[target] over targets that are not IGNORE_INDEX, fp32.

    The backward pass overwrites `logits` with their gradient. A second backward pass is an error of torch.
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
            gradient = logits_NV[rows].float().sub_(log_sum_exp_N1[rows]).exp_()  # fp32 logits are changed in place
            gradient.scatter_add_(1, targets_N1[rows], gradient.new_full((len(gradient), 1), -1.0))
            logits_NV[rows] = gradient.mul_(scale_N1[rows])
        return logits_NV, None


def _chunks(logits_NV: torch.Tensor) -> list[slice]:
    num_rows = max(1, (CUDA_CHUNK if logits_NV.is_cuda else CPU_CHUNK) // logits_NV.shape[1])
    return [slice(start, start + num_rows) for start in range(0, len(logits_NV), num_rows)]


@torch.compiler.disable  # a compiler cannot overwrite its inputs
def causal_lm_loss(logits, labels, vocab_size=None, num_items_in_batch=None, **kwargs) -> torch.Tensor:
    """Replaces Hugging Face's `ForCausalLMLoss` as a model's `loss_function`.

    Args:
        logits: [B, T, V]; the backward pass overwrites them with their gradient.
        labels: long [B, T]; the logits at token t predict label t + 1.
        vocab_size: not used; some models give it by position.
        num_items_in_batch: the divisor of the sum: the number of labels in the whole step, over all ranks and
            accumulated batches. None for the mean over this batch.
    """
    targets_N = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    loss = SummedCrossEntropy.apply(logits.flatten(0, 1), targets_N)
    return loss / ((targets_N != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)
