"""The order and the batches that a run trains on, equal whether it was resumed or not."""

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from neoflix.data.packing import EpochOrder, TokenBatches
from neoflix.data.tokens import count_tokens


def data_seed(args) -> int:
    """The seed of the order of the texts: `--data_seed`, by default `--seed`."""
    return args.seed if args.data_seed is None else args.data_seed


def shuffled_order(dataset, args) -> EpochOrder | None:
    """The order of the texts in each epoch; None for a sampling strategy that Trainer's own sampler serves.

    Trainer's random samplers draw from torch's global generator, so a resumed run would see another order.
    """
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        return None
    by_length = args.train_sampling_strategy == "group_by_length"
    return EpochOrder(count_tokens(dataset), args.texts_per_step, data_seed(args), by_length)


def token_batches(dataset, args) -> TokenBatches:
    """This process's batches of `--tokens_per_device_batch` tokens."""
    return TokenBatches(
        count_tokens(dataset),
        args.tokens_per_device_batch,
        args.gradient_accumulation_steps * args.world_size,
        args.process_index,
        args.world_size,
        data_seed(args),
    )


def load_token_batches(dataset, batches: TokenBatches, collate_fn, args) -> DataLoader:
    """A loader of the batches that `token_batches` made, on this process's device."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
    # Not accelerator.prepare, which would split between the processes what is this process's share already.
    here = {"num_processes": 1, "process_index": 0, "put_on_device": True, "non_blocking": args.dataloader_pin_memory}
    return prepare_data_loader(loader, args.device, **here)


def with_own_generator(loader):
    """Gives a loader a generator of its own for its workers' seeds, and returns it.

    Drawn from torch's global generator, they would shift the draws of dropout with each new iterator, and a resumed run
    makes other iterators than an uninterrupted one.
    """
    loader.base_dataloader.generator = torch.Generator()
    return loader
