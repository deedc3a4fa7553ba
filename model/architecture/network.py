"""The story network: a recurrence with a constant-size state, and a little local attention.

One readable module with two forms of the same function. `forward` takes whole rows of tokens for training;
`step` takes one token and a state, and returns the next state, for decoding. Both must agree: the tests hold
them to 1e-4 in fp32 over lengths, batch sizes, chunk borders and story borders.

What is notable here:
- the recurrence is the scalar-decay state-space form (SSD, Dao & Gu 2024, section 6): inside a chunk it is a
  masked matrix product, between chunks a short loop over states;
- the token `<|endoftext|>` (id 0) starts a story: recurrence, convolution and attention forget what was before;
- norms have no weights (they would be absorbed by the next matrix), linear layers no biases;
- output projections start at zero, so that the network starts as its own embedding;
- rotary positions count from the start of the row: only differences matter (Su et al. 2021);
- attention's heads share one key and one value (Shazeer 2019), which keeps a stream's state small.

Shapes: B batch, T time, D width, V vocabulary, H heads, P values a head, N keys a head, C chunk, S number of
chunks, W window, K convolution taps, M channels that the convolution mixes, E = H x P.

A network lies on disk as `config.json`, `model.safetensors` and the tokenizer it was trained with. A training
checkpoint holds these three files beside the optimiser's state, a model folder beside its decode graphs.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from model.architecture.folder import END_ID, FORMAT, ModelConfig, read_sizes
from model.errors import ModelError


class RecurrentState(NamedTuple):
    """State of one recurrent layer."""

    conv_BKM: Tensor
    """The last K-1 inputs of the convolution, oldest first."""
    memory_BHNP: Tensor


class AttentionState(NamedTuple):
    """State of one attention layer: a ring of the last W keys (already rotated) and values."""

    key_BWP: Tensor
    value_BWP: Tensor
    filled_BW: Tensor
    """True where the ring holds a token of this story."""


LayerState = RecurrentState | AttentionState


class NetworkState(NamedTuple):
    """State of all layers for B streams; its size does not depend on how long they are."""

    position_B: Tensor
    layers: tuple[LayerState, ...]


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last axis to unit root mean square (Zhang & Sennrich 2019), without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary position embedding: x is (..., heads, P), position has x's shape without the last two axes."""
    half = x.size(-1) // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position.float()[..., None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def split_heads(config: ModelConfig, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved (..., M) -> query (..., H, N), with the scale of reads, key (..., H, N), value (..., H, P)."""
    heads, keys, values = config.heads, config.key_dim, config.head_dim
    query, key, value = F.silu(mixed).split((heads * keys, heads * keys, heads * values), dim=-1)
    query = query.unflatten(-1, (heads, keys)) * keys**-0.5
    return query, key.unflatten(-1, (heads, keys)), value.unflatten(-1, (heads, values))


class Recurrence(nn.Module):
    """Gated linear recurrence: memory <- decay * memory + write * key value^T, read out by a query."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, keys, values = config.heads, config.key_dim, config.head_dim
        self.sizes = (heads * keys, heads * keys, heads * values)
        channels = sum(self.sizes)
        self.inputs = nn.Linear(config.width, channels + heads * values, bias=False)
        self.rate = nn.Linear(config.width, heads, bias=True)
        self.conv = nn.Parameter(torch.empty(config.conv_width, channels))
        self.log_decay = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.ones(heads, 1))
        self.output = nn.Linear(heads * values, config.width, bias=False)
        self.reset()

    def reset(self) -> None:
        """Spread the heads' memories from a few words to a whole story (as Mamba-2 does, Gu & Dao 2024)."""
        heads = self.config.heads
        nn.init.normal_(self.inputs.weight, std=self.config.width**-0.5)
        nn.init.zeros_(self.rate.weight)
        nn.init.zeros_(self.output.weight)
        with torch.no_grad():
            # softplus(bias) = 0.1 for all heads; decay rates then give half-lives of about 7 to 450 tokens.
            self.rate.bias.fill_(float(torch.expm1(torch.tensor(0.1)).log()))
            self.log_decay.copy_(torch.linspace(0.0, -4.2, heads))
            self.conv.zero_()
            self.conv[-1] = 1.0
            self.skip.fill_(1.0)

    def _write(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Write strength and log of the decay, both (..., H) and in fp32."""
        write = F.softplus(self.rate(x).float())
        return write, -write * self.log_decay.float().exp()

    def forward(self, x_BTD: Tensor, story_BT: Tensor) -> Tensor:
        """`story_BT` numbers the stories of a row; nothing passes from one to the next."""
        batch, time, _ = x_BTD.shape
        projected = self.inputs(x_BTD)
        mixed_BTM, gate_BTE = projected.split([sum(self.sizes), projected.size(-1) - sum(self.sizes)], dim=-1)
        mixed_BTM = self._convolve(mixed_BTM, story_BT)
        query, key, value = split_heads(self.config, mixed_BTM)
        write_BTH, log_decay_BTH = self._write(x_BTD)
        read = self._scan(query, key * write_BTH[..., None].to(key.dtype), value, log_decay_BTH, story_BT)
        read = read + self.skip.to(value.dtype) * value
        return cast(Tensor, self.output(rms_norm(read).reshape(batch, time, -1) * F.silu(gate_BTE)))

    def _convolve(self, mixed_BTM: Tensor, story_BT: Tensor) -> Tensor:
        """Depthwise causal convolution; a tap that reaches into another story reads zero."""
        taps = self.conv.to(mixed_BTM.dtype)
        total = mixed_BTM * taps[-1]
        for back in range(1, min(self.config.conv_width, mixed_BTM.size(1))):
            same = (story_BT[:, back:] == story_BT[:, :-back]).to(mixed_BTM.dtype)[..., None]
            shifted = mixed_BTM[:, :-back] * same * taps[-1 - back]
            total = total + F.pad(shifted, (0, 0, back, 0))
        return total

    def _scan(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, story: Tensor) -> Tensor:
        """The recurrence over a whole row: query, key (B,T,H,N), value (B,T,H,P) -> (B,T,H,P)."""
        time = query.size(1)
        chunk = min(self.config.chunk, time)
        if extra := -time % chunk:
            query, key, value, log_decay = (
                F.pad(part, (0, 0) * (part.dim() - 2) + (0, extra)) for part in (query, key, value, log_decay)
            )
            story = F.pad(story, (0, extra), value=-1)
        story_BSC = story.unflatten(1, (-1, chunk))
        query, key, value = (part.unflatten(1, (-1, chunk)).transpose(2, 3) for part in (query, key, value))
        total_BSHC = log_decay.unflatten(1, (-1, chunk)).transpose(2, 3).cumsum(-1)

        # Within a chunk: position i reads position j <= i, faded by the decays between them.
        causal_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).tril()
        visible = causal_CC & (story_BSC[..., :, None] == story_BSC[..., None, :])
        gap_BSHCC = total_BSHC[..., :, None] - total_BSHC[..., None, :]
        fade_BSHCC = gap_BSHCC.masked_fill(~visible[:, :, None], -torch.inf).exp().to(query.dtype)
        read_BSHCP = ((query @ key.transpose(-1, -2)) * fade_BSHCC) @ value

        # Between chunks: each leaves a state of its last story, which fades over the next.
        last_BSC = story_BSC == story_BSC[..., -1:]
        to_end_BSHC = (total_BSHC[..., -1:] - total_BSHC).exp() * last_BSC[:, :, None]
        left_BSHNP = (key * to_end_BSHC[..., None].to(key.dtype)).transpose(-1, -2) @ value
        before_BS = F.pad(story_BSC[:, :-1, -1], (1, 0), value=-2)
        kept_BSH = total_BSHC[..., -1].exp() * (story_BSC[..., -1] == before_BS)[..., None]
        memory = torch.zeros_like(left_BSHNP[:, 0], dtype=torch.float32)
        memories = []
        for index in range(left_BSHNP.size(1)):
            memories.append(memory)
            memory = memory * kept_BSH[:, index, :, None, None] + left_BSHNP[:, index].float()
        from_start_BSHC = total_BSHC.exp() * (story_BSC == before_BS[..., None])[:, :, None]
        memory_BSHNP = torch.stack(memories, dim=1).to(query.dtype)
        read_BSHCP = read_BSHCP + (query * from_start_BSHC[..., None].to(query.dtype)) @ memory_BSHNP
        return cast(Tensor, read_BSHCP.transpose(2, 3).flatten(1, 2)[:, :time])

    def initial_state(self, batch: int) -> RecurrentState:
        config, like = self.config, self.inputs.weight
        conv = like.new_zeros(batch, config.conv_width - 1, sum(self.sizes))
        return RecurrentState(conv, like.new_zeros(batch, config.heads, config.key_dim, config.head_dim))

    def step(self, x_BD: Tensor, state: RecurrentState, fresh_B: Tensor) -> tuple[Tensor, RecurrentState]:
        """One token; where `fresh_B`, a story starts and the state counts as empty."""
        keep_B = (~fresh_B).to(x_BD.dtype)
        projected = self.inputs(x_BD)
        mixed_BM, gate_BE = projected.split([sum(self.sizes), projected.size(-1) - sum(self.sizes)], dim=-1)
        seen_BKM = torch.cat([state.conv_BKM * keep_B[:, None, None], mixed_BM[:, None]], dim=1)
        query, key, value = split_heads(self.config, (seen_BKM * self.conv).sum(1))
        write_BH, log_decay_BH = self._write(x_BD)
        memory = state.memory_BHNP * (log_decay_BH.exp() * keep_B[:, None])[..., None, None]
        memory = memory + (key * write_BH[..., None])[..., :, None] * value[..., None, :]
        read = (query[..., None, :] @ memory).squeeze(-2) + self.skip * value
        y_BD = self.output(rms_norm(read).flatten(1) * F.silu(gate_BE))
        return y_BD, RecurrentState(seen_BKM[:, 1:], memory)


class Attention(nn.Module):
    """Attention over the last W tokens of the story, with normed queries and keys (Henry et al. 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.sizes = (inner, config.head_dim, config.head_dim)
        self.inputs = nn.Linear(config.width, sum(self.sizes), bias=False)
        self.output = nn.Linear(inner, config.width, bias=False)
        self.gain = nn.Parameter(torch.empty(config.heads, 1))
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.inputs.weight, std=self.config.width**-0.5)
        nn.init.zeros_(self.output.weight)
        # Normed queries and keys give scores of at most P * gain * P**-0.5; a gain of 1.2 lets softmax be sharp.
        nn.init.constant_(self.gain, 1.2)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> query (..., H, P), key (..., 1, P), value (..., 1, P); query and key normed and rotated."""
        query, key, value = self.inputs(x).split(self.sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.config.head_dim)) for part in (query, key, value))
        base = self.config.rope_base
        query = rotate(rms_norm(query), position, base) * self.gain.to(query.dtype)
        return query, rotate(rms_norm(key), position, base), value

    def forward(self, x_BTD: Tensor, story_BT: Tensor) -> Tensor:
        batch, time, _ = x_BTD.shape
        position_T = torch.arange(time, device=x_BTD.device)
        query, key, value = (part.transpose(1, 2) for part in self._project(x_BTD, position_T.expand(batch, -1)))
        ago_TT = position_T[:, None] - position_T
        near_TT = (ago_TT >= 0) & (ago_TT < self.config.window)
        visible_BTT = near_TT & (story_BT[:, :, None] == story_BT[:, None, :])
        key, value = (part.expand_as(query) for part in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=visible_BTT[:, None])
        return cast(Tensor, self.output(y.transpose(1, 2).flatten(2)))

    def initial_state(self, batch: int) -> AttentionState:
        config, like = self.config, self.inputs.weight
        ring = like.new_zeros(batch, config.window, config.head_dim)
        filled = torch.zeros(batch, config.window, dtype=torch.bool, device=like.device)
        return AttentionState(ring, ring.clone(), filled)

    def step(
        self, x_BD: Tensor, state: AttentionState, fresh_B: Tensor, position_B: Tensor
    ) -> tuple[Tensor, AttentionState]:
        """One token: it takes the ring's oldest place, then attends to all that the ring holds."""
        query, key, value = self._project(x_BD, position_B)
        place_W = torch.arange(self.config.window, device=x_BD.device)
        slot_BW = place_W == (position_B % self.config.window)[:, None]
        filled_BW = (state.filled_BW & ~fresh_B[:, None]) | slot_BW
        keys_BWP = torch.where(slot_BW[..., None], key, state.key_BWP)
        values_BWP = torch.where(slot_BW[..., None], value, state.value_BWP)
        score_BHW = query @ keys_BWP.transpose(1, 2) * self.config.head_dim**-0.5
        weight_BHW = score_BHW.masked_fill(~filled_BW[:, None], -torch.inf).softmax(-1)
        y = weight_BHW @ values_BWP
        return self.output(y.flatten(1)), AttentionState(keys_BWP, values_BWP, filled_BW)


class Block(nn.Module):
    """A mixer over time, then a ReLU² MLP (So et al. 2021), each on a normed copy of the residual stream."""

    def __init__(self, kind: str, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.mixer = Recurrence(config) if kind == "R" else Attention(config)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)
        nn.init.normal_(self.up.weight, std=config.width**-0.5)
        nn.init.zeros_(self.down.weight)

    def mlp(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.relu(self.up(rms_norm(x))).square()))

    def forward(self, x_BTD: Tensor, story_BT: Tensor) -> Tensor:
        x_BTD = x_BTD + cast(Tensor, self.dropout(self.mixer(rms_norm(x_BTD), story_BT)))
        return x_BTD + cast(Tensor, self.dropout(self.mlp(x_BTD)))

    def step(self, x_BD: Tensor, state: LayerState, fresh_B: Tensor, position_B: Tensor) -> tuple[Tensor, LayerState]:
        y_BD: Tensor
        if isinstance(self.mixer, Attention):
            y_BD, state = self.mixer.step(rms_norm(x_BD), cast(AttentionState, state), fresh_B, position_B)
        else:
            y_BD, state = self.mixer.step(rms_norm(x_BD), cast(RecurrentState, state), fresh_B)
        x_BD = x_BD + y_BD
        return x_BD + self.mlp(x_BD), state


class StoryNetwork(nn.Module):
    """Embedding, blocks, and the same embedding as the output matrix (Press & Wolf 2017).

    `dropout` (Srivastava et al. 2014) is the share of the embedded tokens' and of each branch's values that
    training drops; `eval()` and the step form drop none.
    """

    def __init__(self, config: ModelConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(kind, config, dropout) for kind in config.pattern)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Tokens to the last normed hidden state (B, T, D)."""
        story_BT = (tokens_BT == END_ID).cumsum(1)
        x_BTD = self.dropout(rms_norm(self.embedding(tokens_BT)))
        for block in self.blocks:
            x_BTD = block(x_BTD, story_BT)
        return rms_norm(x_BTD)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Tokens to the logits (B, T, V) of each next token."""
        return F.linear(self.hidden(tokens_BT), self.embedding.weight)

    def loss_sum(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed cross-entropy in nats; targets of -1 do not count."""
        logits = self(tokens_BT).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets_BT.flatten(), ignore_index=-1, reduction="sum")

    def initial_state(self, batch: int) -> NetworkState:
        """The state before the first token."""
        layers = tuple(cast(Block, block).mixer.initial_state(batch) for block in self.blocks)
        return NetworkState(torch.zeros(batch, dtype=torch.long, device=self.embedding.weight.device), layers)

    def step(self, tokens_B: Tensor, state: NetworkState) -> tuple[Tensor, NetworkState]:
        """One token a stream to the next logits (B, V) and the next state."""
        fresh_B = tokens_B == END_ID
        x_BD = rms_norm(self.embedding(tokens_B))
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x_BD, layer = cast(Block, block).step(x_BD, layer, fresh_B, state.position_B)
            layers.append(layer)
        logits_BV = F.linear(rms_norm(x_BD), self.embedding.weight)
        return logits_BV, NetworkState(state.position_B + 1, tuple(layers))

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def save_network(
    network: StoryNetwork, folder: Path, *, tokenizer: Path, notes: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write the network into an existing `folder`, its weights as `dtype`; `notes` go into config.json."""
    weights = {name: value.detach().to(dtype).contiguous() for name, value in network.state_dict().items()}
    # Written as any other file: `safetensors.torch.save_file` makes it readable by the owner only.
    (folder / "model.safetensors").write_bytes(save(weights))
    config = {"format": FORMAT, "model": network.config.as_dict(), **notes}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")


def load_network(folder: Path) -> StoryNetwork:
    """The network of a checkpoint or model folder, in fp32 and in evaluation mode.

    Raises:
        ModelError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    network = StoryNetwork(read_sizes(folder))
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / 'model.safetensors'} cannot be read: {error}") from None
    try:
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except RuntimeError as error:
        raise ModelError(
            f"{folder}: weights and config.json do not fit: {str(error).splitlines()[-1].strip()}"
        ) from None
    return network.eval()
