"""
Two architectures in one file, each with a forward pass for training and one over a KV cache.

    model = GPT(GPTConfig(arch='modern', n_layer=6, n_head=6, n_embd=384))
    logits, loss = model(idx, targets)                     # training and evaluation
    logits, _ = model(idx, cache=KVCache(model, rows=8))   # generation: logits of the next token

'gpt2' is GPT-2 as released (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"; https://github.com/openai/gpt-2/blob/master/src/model.py). 'modern' is what
`transformers` calls NanoChat (https://github.com/karpathy/nanochat): rotary positions, RMS norms
without parameters, normalised queries and keys, squared ReLU, grouped key/value heads, logits that
stay within 15. Weights keep the names that GPT2LMHeadModel and NanoChatForCausalLM give them;
GPT-2's Conv1D holds the matrices in TRANSPOSED the other way round.

Shapes: B rows, T tokens, S tokens in the cache, C = n_embd, H = n_head, G = n_kv_head (H unless
set), D = C / H, V = vocab_size.
"""

import math
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

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
    bias: bool = False  # in Linear and LayerNorm; GPT-2 as released has them, 'modern' never
    arch: str = 'gpt2'  # or 'modern'
    n_kv_head: int | None = None  # heads of keys and values, 'modern' only; None: as many as n_head

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head'):
            value = getattr(self, name)
            if value is None and name == 'n_kv_head':
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name}={value!r}: must be at least 1, and whole')
        if self.n_embd % self.n_head:
            near = max(self.n_head, round(self.n_embd / self.n_head) * self.n_head)
            raise ValueError(
                f'n_embd={self.n_embd} cannot be split over n_head={self.n_head} heads; '
                f'the nearest that can is n_embd={near}'
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout={self.dropout}: must be at least 0 and below 1')
        if self.arch not in ('gpt2', 'modern'):
            raise ValueError(f"arch={self.arch!r}: give 'gpt2' or 'modern'")
        if self.arch == 'modern':
            self.check_modern()
        elif self.n_kv_head not in (None, self.n_head):
            raise ValueError(
                f"n_kv_head={self.n_kv_head}: arch='gpt2' has as many as n_head={self.n_head}; "
                "leave it at None, or take arch='modern'"
            )

    def check_modern(self) -> None:
        """Refuse what NanoChatForCausalLM could not load."""
        if self.bias:
            raise ValueError("bias=True: arch='modern' has no biases; take --bias=False")
        if self.n_embd // self.n_head % 2:
            raise ValueError(
                f'n_embd={self.n_embd} over n_head={self.n_head} makes heads of '
                f'{self.n_embd // self.n_head}: rotary positions turn pairs, so take an even size'
            )
        if self.n_head % self.kv_heads:
            fits = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise ValueError(
                f'n_kv_head={self.n_kv_head} cannot serve n_head={self.n_head} heads in equal '
                f'groups; give one of {", ".join(map(str, fits))}'
            )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head


def dropout(x, p, training):
    """F.dropout; on a CPU from 16 random bits an element, which takes a fifth of its time."""
    if not (training and p > 0.0):
        return x
    if x.device.type != 'cpu':
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    share = min(round(p * 2**16), 2**16 - 1)  # of 2^16 values, those that drop
    keep = torch.ge(bits, share - 2**15, out=torch.empty_like(x))
    return x * keep.mul_(2**16 / (2**16 - share))


def attention(q, k, v, p=0.0, cache=None, mask=None, layer=None):
    """Causal attention of q (B, H, T, D) to k, v (B, G, T, D), and to the cache -> (B, T, C).

    p: of dropping a weight; for training. mask (B, 1, T, T): what attends to what, without a cache.
    """
    grouped, dtype = k.size(1) < q.size(1), q.dtype
    if q.device.type == 'mps':  # before torch 2.12 it mixes up the rows of what was permuted
        q, k, v = (t.contiguous() for t in (q, k, v))
    if cache is not None:
        k, v = cache.append(layer, k, v)  # (B, G, S, D): the past, if there is any, and the new
    if cache is not None and cache.mask is not None:
        q, mask = q.to(k.dtype), cache.mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).to(dtype)
    elif q.dtype == torch.bfloat16 and q.device.type == 'cpu' and q.size(2) <= 1024:
        y = eager_attention(q, k, v, p, mask)
    elif mask is not None:
        if grouped and q.device.type == 'cuda':  # else by products, which keep (B, H, T, T)
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
            grouped = False
        y = F.scaled_dot_product_attention(q, k, v, mask, p, enable_gqa=grouped)
    else:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)


def document_mask(documents):
    """What attends to what (B, 1, T, T): no token to a later one or to another document's.

    documents (B, T): a number for each token, which tells its document from the others of the row.
    """
    mask = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return mask.tril_()[:, None]


def eager_attention(q, k, v, p, mask=None):
    """Causal attention as plain products (Vaswani et al. 2017, equation 1).

    For bfloat16 on a CPU, where torch's fused kernel takes three times as long at T = 256, most of
    it going backward, and at 2,048 still half as long again; the limit of 1,024 is for the memory,
    which grows with T squared.
    """
    B, H, T, D = q.shape
    k, v = (t.repeat_interleave(H // t.size(1), 1) for t in (k, v))  # (B, H, T, D)
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    if mask is not None:  # heads share it
        future = future.masked_fill(~mask, -math.inf).expand(B, H, T, T).reshape(B * H, T, T)
    scores = torch.baddbmm(future, q, k.mT, alpha=D**-0.5)  # (B * H, T, T)
    weights = dropout(scores.softmax(-1).to(v.dtype), p, training=True)
    return (weights @ v).view(B, H, T, D)


def run_blocks(blocks, x, *others, recompute=False):
    """x (B, T, C) through one block after the other.

    recompute: keep only what goes from block to block, and compute the rest a second time for the
    gradient (Chen et al. 2016), with the same random numbers: less memory, a third more work.
    """
    for layer, block in enumerate(blocks):
        if recompute and torch.is_grad_enabled():
            again = torch.utils.checkpoint.checkpoint
            x = again(block, x, *others, layer, use_reentrant=False)
        else:
            x = block(x, *others, layer)
    return x


# -----------------------------------------------------------------------------
# arch='gpt2'


class LayerNorm(nn.Module):
    """Layer normalisation whose bias is optional, at GPT-2's epsilon."""

    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class GPT2Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, cache=None, mask=None, layer=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        p = self.dropout if self.training else 0.0
        y = attention(q, k, v, p, cache, mask, layer)  # (B, T, C)
        return dropout(self.c_proj(y), self.dropout, self.training)


class GPT2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate='tanh')  # the tanh form is what GPT-2 was trained with
        return dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class GPT2Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = GPT2Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = GPT2MLP(config)

    def forward(self, x, cache=None, mask=None, layer=None):
        x = x + self.attn(self.ln_1(x), cache, mask, layer)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 between the token ids and the last norm."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias)
        self.dropout = config.dropout
        self.recompute = False  # gradient checkpointing

    def forward(self, idx, pos, cache=None, mask=None):
        x = self.wte(idx) + self.wpe(pos)  # (B, T, C)
        x = dropout(x, self.dropout, self.training)
        return self.ln_f(run_blocks(self.h, x, cache, mask, recompute=self.recompute))

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: normal, 0.02; projections into the residual stream / sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.h)))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)


# -----------------------------------------------------------------------------
# arch='modern'


class RMSNorm(torch.autograd.Function):
    """Root mean square of the last dimension to 1 (Zhang and Sennrich 2019), no parameters.

    Written out, because on a CPU F.rms_norm and its gradient take three times as long. The scale is
    rounded to x's dtype. Can be differentiated once.
    """

    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.size(-1) + 1e-6).rsqrt().to(x.dtype)  # (..., 1)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / y.size(-1)
        return torch.addcmul(grad, y, along, value=-1) * scale  # y's length cannot change


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2 (So et al. 2021, Primer), written out for the same reason."""

    @staticmethod
    def forward(ctx, x):
        y = x.relu()
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, y, value=2)  # 2 grad y in one pass


rms_norm, squared_relu = RMSNorm.apply, SquaredReLU.apply


def rotary_cos_sin(pos, head_size, dtype):
    """Cosine and sine of the rotary angles (Su et al. 2021) at pos (T,) or (B, T).

    Both are (..., T, 1, D / 2); the frequencies fall from 1 towards 1 / 10,000 radians a token.
    """
    pair = torch.arange(0, head_size, 2, device=pos.device, dtype=torch.float32)
    angle = pos[..., None, None].float() * 10000.0 ** (-pair / head_size)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x, cos, sin):
    """Turn each pair (x1, x2) of x (B, T, H, D) clockwise by its angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class ModernAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.head_size = config.n_embd // config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, self.kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(config.n_embd, self.kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.qkv_proj = None  # the first three in one, once quantize.py has joined them
        self.dropout = config.dropout

    def forward(self, x, angles, cache=None, mask=None, layer=None):
        projections = self.q_proj, self.k_proj, self.v_proj
        if self.qkv_proj is not None:
            qkv = self.qkv_proj(x)
        elif all(type(proj) is nn.Linear for proj in projections):  # one product is faster
            qkv = F.linear(x, torch.cat([proj.weight for proj in projections]))
        else:  # lora.py adds to them
            qkv = torch.cat([proj(x) for proj in projections], dim=-1)
        qkv = qkv.unflatten(2, (-1, self.head_size))  # (B, T, H + 2 G, D)
        qk, v = qkv.split((self.n_head + self.kv_heads, self.kv_heads), dim=2)
        qk = rms_norm(apply_rotary(qk, *angles))
        q, k = qk.split((self.n_head, self.kv_heads), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, G, T, D) twice
        # no dropout of attention weights: on a CPU it would cost as much as the attention
        y = attention(q, k, v, 0.0, cache, mask, layer)  # (B, T, C)
        return dropout(self.o_proj(y), self.dropout, self.training)


class ModernMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.dropout = config.dropout

    def forward(self, x):
        x = squared_relu(self.fc1(x))
        return dropout(self.fc2(x), self.dropout, self.training)  # (B, T, C)


class ModernBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = ModernAttention(config)
        self.mlp = ModernMLP(config)

    def forward(self, x, angles, cache=None, mask=None, layer=None):
        x = x + self.self_attn(rms_norm(x), angles, cache, mask, layer)
        return x + self.mlp(rms_norm(x))


class Modern(nn.Module):
    """The modern architecture between the token ids and the last norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(ModernBlock(config) for _ in range(config.n_layer))
        self.head_size = config.n_embd // config.n_head
        self.dropout = config.dropout
        self.recompute = False  # gradient checkpointing

    def forward(self, idx, pos, cache=None, mask=None):
        x = self.embed_tokens(idx)  # (B, T, C)
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            x = x.bfloat16()  # half the memory traffic, as NanoChat trains; float16 could overflow
        x = dropout(rms_norm(x), self.dropout, self.training)
        angles = rotary_cos_sin(pos, self.head_size, x.dtype)
        others = angles, cache, mask
        return rms_norm(run_blocks(self.layers, x, *others, recompute=self.recompute))

    @torch.no_grad()
    def init_weights(self):
        """Blocks begin as the identity: their last matrices are zero, the others 1 / sqrt(C)."""
        nn.init.normal_(self.embed_tokens.weight, std=0.02)  # normed at once: only lr / std matters
        for name, parameter in self.layers.named_parameters():
            if name.endswith(('o_proj.weight', 'fc2.weight')):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)


# -----------------------------------------------------------------------------
# either


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        if config.arch == 'gpt2':
            self.transformer = GPT2(config)
        else:
            self.model = Modern(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        if config.arch == 'modern':
            nn.init.normal_(self.lm_head.weight, std=0.001)  # all tokens begin equally likely
        self.trunk.init_weights()

    def tie_weights(self) -> None:
        """GPT-2 reads and writes tokens by one matrix."""
        if self.config.arch == 'gpt2':
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def trunk(self) -> nn.Module:
        """All but the head, under the name that `transformers` gives it."""
        return self.transformer if self.config.arch == 'gpt2' else self.model

    @property
    def embedding(self) -> nn.Embedding:
        """What turns token ids into vectors; on its device and in its dtype the model computes."""
        return self.transformer.wte if self.config.arch == 'gpt2' else self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h if self.config.arch == 'gpt2' else self.model.layers

    def forward(
        self, idx, targets=None, cache=None, lengths=None, all_positions=False, documents=None
    ):
        """Logits, and the mean cross-entropy in nats per token if targets are given, else None.

        idx (B, T): token ids. targets (B, T): the token that follows each; -1 does not count.
        cache: a KVCache with B rows; idx continues each row where it stands, and the cache grows.
        lengths (B,): with a cache, how many of each row's T tokens are real; the rest is padding.
        documents (B, T): without one, the number of each token's document in the row; a token
        attends to its own document, and positions run on from one document to the next.
        Logits are (B, T, V), with a cache (B, V): those that follow each row's last real token, or
        with all_positions=True those that follow every token.
        """
        B, T = idx.shape
        if cache is None:
            pos = torch.arange(T, device=idx.device)  # (T,)
        else:
            pos = cache.extend(B, T, lengths)  # (B, T)
        mask = None if documents is None else document_mask(documents)
        x = self.trunk(idx, pos, cache, mask)  # (B, T, C)
        if (
            cache is not None and not all_positions
        ):  # only the last real token is asked what follows it
            x = x[:, -1] if lengths is None else x[torch.arange(B, device=x.device), lengths - 1]
        logits = self.head(x)  # (B, T, V) or (B, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def head(self, x):
        """What the trunk makes of tokens (..., C) -> logits of the token that follows (..., V)."""
        logits = self.lm_head(x)
        return logits if self.config.arch == 'gpt2' else 15.0 * torch.tanh(logits.float() / 15.0)

    def block_matrices(self) -> list[nn.Parameter]:
        """The matrices inside the blocks: neither embeddings nor head, no gains, no biases."""
        inside = [p for block in self.blocks for p in block.parameters()]
        return [p for p in inside if p.dim() == 2 and p.requires_grad]

    def param_groups(self, weight_decay: float, exclude=()) -> list[dict]:
        """Parameters for an optimizer: matrices and embeddings decay, biases and gains do not."""
        excluded = {id(p) for p in exclude}
        params = [p for p in self.parameters() if p.requires_grad and id(p) not in excluded]
        return [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]

    def num_params(self, trained: bool = False) -> int:
        """Parameters without the embeddings that are looked up and multiply nothing."""
        lookup = self.transformer.wpe if self.config.arch == 'gpt2' else self.embedding
        counted = [p for p in self.parameters() if p is not lookup.weight]
        return sum(p.numel() for p in counted if p.requires_grad or not trained)

    def flops_per_token(self) -> int:
        """Forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM, appendix B).

        Two of the six are for the gradient of a parameter, which a frozen one has none of; two are
        for the gradient that goes on down, and in attention eight of the twelve, which the first
        blocks are spared if they and the embeddings are frozen.
        """
        c, N = self.config, self.num_params()
        spared = [] if self.embedding.weight.requires_grad else self.blocks
        spared = list(takewhile(lambda b: not any(p.requires_grad for p in b.parameters()), spared))
        matrices = 4 * N + 2 * self.num_params(trained=True)
        matrices -= 2 * sum(p.numel() for block in spared for p in block.parameters())
        return matrices + (12 * c.n_layer - 8 * len(spared)) * c.n_embd * c.block_size

    def freeze_lower(self, blocks: int) -> None:
        """Have training leave the embeddings and the first blocks as they are.

        GPT-2's head is its embedding, and stays too.
        """
        if blocks > len(self.blocks):
            raise ValueError(f'freeze={blocks}: the model has {len(self.blocks)} blocks')
        tables = [child for child in self.trunk.children() if isinstance(child, nn.Embedding)]
        for module in (*tables, *self.blocks[:blocks]):
            module.requires_grad_(False)

    def crop_block_size(self, block_size: int) -> None:
        """Forget the positions past `block_size`: a smaller context out of a pretrained model."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        if self.config.arch == 'gpt2':
            self.transformer.wpe = nn.Embedding.from_pretrained(
                self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False
            )
