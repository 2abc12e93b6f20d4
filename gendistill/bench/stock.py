"""The same training step of stock parts: transformers' layers, fla-core's ops, full logits, torch's optimizer.

It is written as somebody would who has these packages and not ours: SDPA, for which transformers makes a mask of
packed positions; bfloat16 autocast over float32 weights; ``log_softmax`` and ``kl_div`` over the whole vocabulary; the
fused AdamW. Weights, batches, what is trained and what is minimised are ours.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gendistill.anatomy.groups import param_group
from gendistill.anatomy.kda import KDASettings
from gendistill.bench.pair import make_student, make_teacher
from gendistill.bench.shapes import Shape
from gendistill.config.schema import StageConfig
from gendistill.data.batch import IGNORE, Batch


class Parts(Protocol):
    """What converted layers are made of; without it they mix nothing.

    Attributes:
        label: Package and version.
    """

    label: str

    def conv(self, channels: int, taps: int) -> nn.Module:
        """Make a causal convolution with bias; called with ``[1, N, C]`` and ``cu_seqlens``, it returns a pair."""
        ...

    def rule(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, **settings: Any) -> Tensor:
        """Apply the delta rule ``[1, N, H, D]`` to raw gates."""
        ...


class FlaParts:
    """Those of fla-core.

    Raises:
        ImportError: It is not installed.
    """

    def __init__(self) -> None:
        os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
        self._conv: Any = importlib.import_module("fla.modules").ShortConvolution
        self._kda: Any = importlib.import_module("fla.ops.kda").chunk_kda
        self.label = f"fla-core {metadata.version('fla-core')}"

    def conv(self, channels: int, taps: int) -> nn.Module:
        """As :class:`Parts` says."""
        return self._conv(channels, taps, bias=True, activation=None)

    def rule(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, **settings: Any) -> Tensor:
        """As :class:`Parts` says."""
        return self._kda(
            q,
            k,
            v,
            decay,
            beta,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            safe_gate=True,
            **settings,
        )[0]


class StockKDA(nn.Module):
    """A KDA layer of stock parts, with the parameters of ours.

    Args:
        attention: The layer whose place it takes.
        config: Of the model.
        parts: Convolution and rule; None: tokens are not mixed.
    """

    def __init__(self, attention: Any, config: Any, parts: Parts | None) -> None:
        super().__init__()
        settings = KDASettings()
        hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, attention.head_dim
        size, kv_size = heads * head_dim, config.num_key_value_heads * head_dim
        self.heads, self.head_dim, self.parts = heads, head_dim, parts
        self.group = heads // config.num_key_value_heads
        self.lower_bound = settings.gate_lower_bound
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        self.f_a_proj = nn.Linear(hidden, head_dim, bias=False)
        self.f_b_proj = nn.Linear(head_dim, size, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, head_dim, bias=False)
        self.g_b_proj = nn.Linear(head_dim, size)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(size))
        if parts is not None:
            self.q_conv1d = parts.conv(size, settings.conv_size)
            self.k_conv1d = parts.conv(kv_size, settings.conv_size)
            self.v_conv1d = parts.conv(kv_size, settings.conv_size)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Mix the tokens of every document; returns ``[B, T, hidden_size]``, and None for weights."""
        x = hidden_states.flatten(0, 1)[None]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.parts is not None:
            q, _ = self.q_conv1d(q, cu_seqlens=cu_seqlens)
            k, _ = self.k_conv1d(k, cu_seqlens=cu_seqlens)
            v, _ = self.v_conv1d(v, cu_seqlens=cu_seqlens)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        k, v = (part.repeat_interleave(self.group, dim=2) for part in (k, v))
        decay = self.f_b_proj(self.f_a_proj(x)).unflatten(-1, (self.heads, self.head_dim))
        beta = self.b_proj(x)
        if self.parts is None:
            mixed = (q + k + decay) * beta.unsqueeze(-1) + v
        else:
            mixed = self.parts.rule(
                q,
                k,
                v,
                decay,
                beta,
                A_log=self.A_log,
                dt_bias=self.dt_bias,
                lower_bound=self.lower_bound,
                cu_seqlens=cu_seqlens,
            )
        gated = mixed.flatten(-2) * F.silu(self.g_b_proj(self.g_a_proj(x)))
        return self.o_proj(gated).view_as(hidden_states), None


class StockStep:
    """Training steps of stock parts.

    Args:
        shape: Of teacher and student.
        stage: Rates and what is trained; ``kl`` or ``block_output`` as its objective.
        device: Where.
        teacher_dtype: Of the teacher's weights.
        parts: What converted layers are made of.
        seed: Of the weights: those of the bench.
    """

    def __init__(
        self,
        shape: Shape,
        stage: StageConfig,
        *,
        device: torch.device,
        teacher_dtype: torch.dtype,
        parts: Parts | None,
        seed: int,
    ) -> None:
        self.device, self.stage = device, stage
        self.autocast = device.type == "cuda"
        self.teacher = make_teacher(shape, device=device, dtype=teacher_dtype, seed=seed)
        ours = make_student(self.teacher, shape)
        config = AutoConfig.for_model(shape.family, **shape.sizes)
        with torch.device(device):
            self.student: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            self.converted = list(ours.config.converted_layers)
            for layer in self.converted:
                block = self.student.model.layers[layer]
                block.self_attn = StockKDA(block.self_attn, config, parts)
        self.student.to(device).train()
        missing = self.student.load_state_dict(ours.state_dict(), strict=False).missing_keys
        assert not missing, missing
        kinds, tied = ours.config.mixers or (), config.tie_word_embeddings
        for name, parameter in self.student.named_parameters():
            group = param_group(name, kinds, tied_head=tied)
            inside = stage.objective.kind == "kl" or any(
                name.startswith(f"model.layers.{layer}.") for layer in self.converted
            )
            parameter.requires_grad_(group in stage.train and inside)
        self.trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        rate = min(stage.lr.values()) if isinstance(stage.lr, dict) else stage.lr
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=rate, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        if stage.gradient_checkpointing:
            self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Take one optimizer step; returns the mean loss of a label."""
        self.optimizer.zero_grad()
        labels = sum(batch.num_labels for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.loss(batch) / labels
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained, self.stage.grad_clip)
        self.optimizer.step()
        return total

    def loss(self, batch: Batch) -> Tensor:
        """Sum the loss over a micro-batch's labels."""
        batch = batch.to(self.device)
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
            "cu_seqlens": batch.cu_seqlens,
        }
        counted = batch.labels != IGNORE
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)
        if self.stage.objective.kind == "kl":
            with torch.no_grad():
                target = F.log_softmax(self.teacher(**inputs).logits.float(), dim=-1)
            with autocast:
                logits = self.student(**inputs).logits
            log_q = F.log_softmax(logits.float(), dim=-1)
            return (F.kl_div(log_q, target, log_target=True, reduction="none").sum(-1) * counted).sum()
        known = self._blocks(inputs)
        with autocast:
            errors = [self._distance(layer, known[layer], batch, counted) for layer in self.converted]
            return torch.stack(errors).mean()

    @torch.no_grad()
    def _blocks(self, inputs: dict[str, Any]) -> dict[int, tuple[Tensor, Tensor]]:
        """Run the teacher's decoder; what goes into the converted layers and comes out."""
        known: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(layer: int) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
                known[layer] = args[0], output[0] if isinstance(output, tuple) else output

            return hook

        blocks = self.teacher.model.layers
        handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in self.converted]
        self.teacher.model(**inputs)
        for handle in handles:
            handle.remove()
        return known

    def _distance(self, layer: int, io: tuple[Tensor, Tensor], batch: Batch, counted: Tensor) -> Tensor:
        hidden = io[0].float()
        angles = self.student.model.rotary_emb(hidden, batch.position_ids)
        found = self.student.model.layers[layer](
            hidden, position_embeddings=angles, attention_mask=None, cu_seqlens=batch.cu_seqlens
        )
        found = found[0] if isinstance(found, tuple) else found
        return (torch.linalg.vector_norm((found - io[1]).float(), dim=-1) * counted).sum()
