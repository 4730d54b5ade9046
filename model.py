"""
GPT-2 as released, in one file: the forward pass for training and the forward pass over a KV cache.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))
    logits, loss = model(idx, targets)                     # training and evaluation
    logits, _ = model(idx, cache=KVCache(model, rows=8))   # generation: logits of the next token

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and the code
OpenAI released with it, https://github.com/openai/gpt-2/blob/master/src/model.py. Weights keep the
names `transformers` gives them; its Conv1D holds the matrices in TRANSPOSED the other way round.

Shapes: B rows, T tokens, S tokens in the cache, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from configurator import ConfigError

TRANSPOSED = (
    'attn.c_attn.weight',
    'attn.c_proj.weight',
    'mlp.c_fc.weight',
    'mlp.c_proj.weight',
)


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64: faster matrix products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has them

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name}={getattr(self, name)}: must be at least 1')
        if self.n_embd % self.n_head:
            near = max(self.n_head, round(self.n_embd / self.n_head) * self.n_head)
            raise ConfigError(
                f'n_embd={self.n_embd} cannot be split over n_head={self.n_head} heads; '
                f'the nearest that can is n_embd={near}'
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f'dropout={self.dropout}: must be at least 0 and below 1')


class LayerNorm(nn.Module):
    """Layer normalisation whose bias is optional, at GPT-2's epsilon."""

    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def written_out_attention(q, k, v, dropout):
    """Causal attention, q, k, v (B, H, T, D), as plain products (Vaswani et al. 2017, equation 1).

    For a short context in bfloat16 on a CPU: torch's fused kernel takes twice the time there, most
    of it going backward. From about 1,000 tokens on the fused one is faster.
    """
    T = q.size(-2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-2, -1)) * q.size(-1) ** -0.5  # (B, H, T, T)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return F.dropout(weights, dropout) @ v


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, cache=None, layer=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        if cache is None and q.dtype == torch.bfloat16 and q.device.type == 'cpu' and T <= 512:
            y = written_out_attention(q, k, v, dropout)
        elif cache is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            k, v = cache.append(layer, k, v)  # (B, H, S, D): the past and the new tokens
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate='tanh')  # the tanh form is what GPT-2 was trained with
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=None):
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=LayerNorm(config.n_embd, config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one matrix reads and writes tokens
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal, 0.02; projections into the residual stream / sqrt(2 n_layer)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):  # its c_proj was initialised just before
            std = 0.02 / math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.c_proj.weight, std=std)

    def forward(self, idx, targets=None, cache=None, lengths=None):
        """Logits, and the mean cross-entropy in nats per token if targets are given, else None.

        idx (B, T): token ids. targets (B, T): the token that follows each; -1 does not count.
        cache: a KVCache with B rows; idx continues each row where it stands, and the cache grows.
        lengths (B,): with a cache, how many of each row's T tokens are real; the rest is padding.
        Logits are (B, T, V), with a cache (B, V): those that follow each row's last real token.
        """
        B, T = idx.shape
        if cache is None:
            pos = torch.arange(T, device=idx.device)  # (T,)
        else:
            pos = cache.extend(T, lengths)  # (B, T)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer)
        if cache is not None:  # only the last real token is asked what follows it
            last = T - 1 if lengths is None else lengths - 1
            x = x[torch.arange(B, device=x.device), last]  # (B, C)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V) or (B, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Parameters for an optimizer: matrices and embeddings decay, biases and gains do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]

    def num_params(self) -> int:
        """Parameters without the position embeddings, which take no part in a matrix product."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> int:
        """Forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM, appendix B)."""
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size: int) -> None:
        """Forget the positions past `block_size`: a smaller context out of a pretrained model."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False
        )


class KVCache:
    """Keys and values of the tokens each row has seen, so that a new token costs one token's work.

    Rows stand at their own positions and share nothing: `pos` (rows,) counts the tokens each holds.
    """

    def __init__(self, model: GPT, rows: int, length: int | None = None):
        c, weight = model.config, model.lm_head.weight
        self.length = length or c.block_size
        # the column after the last takes the keys of padding, which nothing ever reads
        shape = (c.n_layer, rows, c.n_head, self.length + 1, c.n_embd // c.n_head)
        self.k = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.v = torch.zeros_like(self.k)
        self.pos = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.rows = torch.arange(rows, device=weight.device)[:, None]  # (B, 1)
        self.span = 0  # no row holds more; kept on the host, so that no step waits for the device

    def extend(self, T: int, lengths=None):
        """Make room for T more tokens a row, `lengths` of them real -> their positions (B, T)."""
        assert self.span + T <= self.length, 'the cache is full'
        step = torch.arange(T, device=self.pos.device)
        pos = self.pos[:, None] + step
        self.span += T
        columns = torch.arange(self.span, device=pos.device)
        self.mask = (columns <= pos[..., None])[:, None]  # (B, 1, T, S): what each token may see
        self.slots = pos if lengths is None else pos.where(step < lengths[:, None], self.length)
        self.pos = self.pos + (T if lengths is None else lengths)
        return pos

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, in this order; one may come several times."""
        if rows != list(range(len(self.pos))):
            self.k, self.v, self.pos = self.k[:, rows], self.v[:, rows], self.pos[rows]
            self.rows = torch.arange(len(rows), device=self.pos.device)[:, None]

    def replace(self, rows: list[int], other: 'KVCache') -> None:
        """Give some rows what those of `other`, all of one length, hold in their place."""
        self.k[:, rows, :, : other.span] = other.k[:, :, :, : other.span]
        self.v[:, rows, :, : other.span] = other.v[:, :, :, : other.span]
        self.pos[rows] = other.span

    def append(self, layer: int, k, v):
        """Store a layer's keys and values (B, H, T, D) -> all that its rows hold, (B, H, S, D)."""
        self.k[layer, self.rows, :, self.slots] = k.transpose(1, 2)
        self.v[layer, self.rows, :, self.slots] = v.transpose(1, 2)
        return self.k[layer, :, :, : self.span], self.v[layer, :, :, : self.span]
