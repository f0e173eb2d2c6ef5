"""The fixed vocabulary of what is wrong with a training. A detector's answer is compared with these words only."""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """The true mechanism, which is what would have to be changed; the symptom may be another."""

    LR_TOO_HIGH = "lr too high"
    LR_TOO_LOW = "lr too low"
    WARMUP_MISSING = "warm-up missing"
    NOISE_PLATEAU = "plateau from noise"
    GROUP_LR = "wrong lr of a group"
    GROUP_WEIGHT_DECAY = "wrong weight decay of a group"
    BETA2_TOO_SMALL = "beta2 too small"
    STALE_SECOND_MOMENT = "stale second moment"
    EPS_TOO_LARGE = "adam eps too large"
    CLIP_TOO_LOW = "clipping too low"
    VANISHING = "vanishing gradients"
    EXPLODING = "exploding gradients"
    DEAD_UNITS = "dead units"
    ATTENTION_LOGITS = "attention logits grow"
    OUTPUT_LOGITS = "output logits drift"
    NON_FINITE = "not finite"
    FROZEN = "frozen parameters"
    DISCONNECTED = "disconnected parameters"
    BAD_BATCH = "bad batches"
    DATA_ORDER = "data order"
    WRONG_LABELS = "labels do not belong to inputs"
    ACCUMULATED_GRADIENTS = "gradients not cleared"
    WRONG_LOSS = "wrong loss"
    LOSS_SCALE = "wrong scale of the loss"
