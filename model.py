"""
Two architectures in one file, each with a forward pass for training and one over a KV cache.

    from flatgpt.inference.kv_cache import KVCache

    model = GPT(GPTConfig(arch='modern', n_layer=6, n_head=6, n_embd=384))
    _, loss = model(idx, targets)                          # training and evaluation
    logits, _ = model(idx, cache=KVCache(model, rows=8))   # generation: logits of the next token

'gpt2' is GPT-2 as released (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"; https://github.com/openai/gpt-2/blob/master/src/model.py). 'modern' is NanoChat
of `transformers` (https://github.com/karpathy/nanochat): rotary positions, RMS norms
without parameters, normalized queries and keys, squared ReLU, grouped-query attention, logits
capped at 15. Weights have the names of GPT2LMHeadModel and NanoChatForCausalLM; GPT-2's Conv1D
stores the matrices in TRANSPOSED transposed.

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

LOGITS_AT_ONCE = 2**26  # logits per chunk of an eager loss on CUDA: 0.27 GB in float32


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64: faster matrix products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False  # in Linear and LayerNorm; True in the released GPT-2; 'modern' has none
    arch: str = 'gpt2'  # or 'modern'
    n_kv_head: int | None = None  # key/value heads, 'modern' only; None: n_head
    # 'gpt2': keep the residual stream in bfloat16 under its autocast, as 'modern' always does
    bf16_residual: bool = False
    score: bool = False  # a reward model: one number for a sequence instead of logits

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head'):
            value = getattr(self, name)
            if value is None and name == 'n_kv_head':
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name}={value!r}: must be at least 1 and whole')
        if self.n_embd % self.n_head:
            raise ValueError(
                f'n_embd={self.n_embd} cannot be split over n_head={self.n_head} heads; '
                f'use n_embd={self.nearest_n_embd()}'
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout={self.dropout}: must be at least 0 and below 1')
        if self.arch not in ('gpt2', 'modern'):
            raise ValueError(f"arch={self.arch!r}: must be 'gpt2' or 'modern'")
        if self.arch == 'modern':
            self.check_modern()
        elif self.n_kv_head not in (None, self.n_head):
            raise ValueError(
                f"n_kv_head={self.n_kv_head}: arch='gpt2' always has n_head={self.n_head}; "
                "use n_kv_head=None or arch='modern'"
            )

    def check_modern(self) -> None:
        """Raise ValueError for a shape that NanoChatForCausalLM does not support."""
        if self.bias:
            raise ValueError("bias=True: arch='modern' has no biases; use --bias=False")
        if self.n_embd // self.n_head % 2:
            raise ValueError(
                f'n_embd={self.n_embd} over n_head={self.n_head} makes heads of '
                f'{self.n_embd // self.n_head}, but rotary embeddings need an even size; '
                f'use n_embd={self.nearest_n_embd()}'
            )
        if self.n_head % self.kv_heads:
            fits = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise ValueError(
                f'n_kv_head={self.n_kv_head} cannot serve n_head={self.n_head} heads in equal '
                f'groups; use one of {", ".join(map(str, fits))}'
            )

    def nearest_n_embd(self) -> int:
        """The n_embd closest to this one that n_head heads can share."""
        unit = self.n_head * (2 if self.arch == 'modern' else 1)
        return max(1, round(self.n_embd / unit)) * unit

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head


def dropout(x, p, training):
    """F.dropout; on a CPU with 16 random bits per element, five times as fast."""
    if not (training and p > 0.0):
        return x
    if x.device.type != 'cpu':
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of 2^16 possible values
    keep = torch.ge(bits, dropped - 2**15, out=torch.empty_like(x))
    return x * keep.mul_(2**16 / (2**16 - dropped))


def attention(q, k, v, p=0.0, cache=None, mask=None, layer=None):
    """Causal attention of q (B, H, T, D) to k, v (B, G, T, D) and to the cache -> (B, T, C).

    p: dropout of the attention weights. mask (B, 1, T, T): True where a query may attend, without a
    cache.
    """
    grouped, dtype = k.size(1) < q.size(1), q.dtype
    if q.device.type == 'mps':  # before torch 2.12, permuted tensors mix up rows
        q, k, v = (t.contiguous() for t in (q, k, v))
    if cache is not None:
        k, v = cache.append(layer, k, v)  # (B, G, S, D): past and new tokens
    if cache is not None and cache.mask is not None:
        q, mask = cache.unpack(q).to(k.dtype), cache.mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        y = cache.pack(y).to(dtype)
    elif q.dtype == torch.bfloat16 and q.device.type == 'cpu' and q.size(2) <= 512:
        y = eager_attention(q, k, v, p, mask)
    else:
        if grouped and q.device.type == 'cuda' and not (mask is None and has_flash_attention(q)):
            # otherwise torch stores (B, H, T, T)
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
            grouped = False
        options = {'is_causal': mask is None, 'enable_gqa': grouped}
        y = F.scaled_dot_product_attention(q, k, v, mask, p, **options)
    return y.transpose(1, 2).flatten(2)


def has_flash_attention(q) -> bool:
    """Whether torch has flash attention (Dao 2023) for q, which is on a CUDA GPU.

    It lets heads share keys and values, but has no mask. The memory-efficient kernel has one, but
    does not let heads share in every version of torch.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def document_mask(documents):
    """The causal attention mask (B, 1, T, T) within documents.

    documents (B, T): for each token, the number of its document in the row.
    """
    mask = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return mask.tril_()[:, None]


def eager_attention(q, k, v, p, mask=None):
    """Causal attention as plain matrix products (Vaswani et al. 2017, equation 1).

    For bfloat16 on a CPU, where torch's fused kernel takes three times as long up to T = 512, most
    of it in the backward pass. At T = 1,024 that one is faster, and in float32 both are alike
    (bench.py --only=pieces).
    """
    B, H, T, D = q.shape
    k, v = (t.repeat_interleave(H // t.size(1), 1) for t in (k, v))  # (B, H, T, D)
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    if mask is not None:  # shared by all heads
        future = future.masked_fill(~mask, -math.inf).expand(B, H, T, T).reshape(B * H, T, T)
    scores = torch.baddbmm(future, q, k.mT, alpha=D**-0.5)  # (B * H, T, T)
    weights = dropout(scores.softmax(-1).to(v.dtype), p, training=True)
    return (weights @ v).view(B, H, T, D)


def autocasts_to_bf16(x) -> bool:
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def run_blocks(blocks, x, *others, recompute=False):
    """Apply the blocks to x (B, T, C) in order.

    recompute: gradient checkpointing (Chen et al. 2016) stores only the blocks' inputs and repeats
    the forward pass with the same random numbers: less memory, a third more computation.
    """
    for layer, block in enumerate(blocks):
        if recompute and torch.is_grad_enabled():
            checkpoint = torch.utils.checkpoint.checkpoint
            x = checkpoint(block, x, *others, layer, use_reentrant=False)
        else:
            x = block(x, *others, layer)
    return x


# -----------------------------------------------------------------------------
# arch='gpt2'


class LayerNorm(nn.Module):
    """Layer normalization with an optional bias and GPT-2's epsilon."""

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
        x = F.gelu(self.c_fc(x), approximate='tanh')  # as GPT-2 was trained
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
    """GPT-2 from the token ids to the final norm, without the head."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias)
        self.dropout = config.dropout
        self.bf16_residual = config.bf16_residual
        self.recompute = False  # gradient checkpointing

    def forward(self, idx, pos, cache=None, mask=None):
        x = self.wte(idx) + self.wpe(pos)  # (B, T, C)
        if self.bf16_residual and autocasts_to_bf16(x):
            x = x.bfloat16()
        x = dropout(x, self.dropout, self.training)
        return self.ln_f(run_blocks(self.h, x, cache, mask, recompute=self.recompute))

    @torch.no_grad()
    def init_weights(self):
        """As in GPT-2: std 0.02, over sqrt(2 n_layer) for projections into the residual stream."""
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
    """RMS norm of the last dimension (Zhang and Sennrich 2019), without parameters.

    On a CPU, F.rms_norm and its gradient take three times as long. The scale is rounded to x's
    dtype. Can be differentiated once.
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
        radial = torch.linalg.vecdot(grad, y).unsqueeze(-1) / y.size(-1)
        return torch.addcmul(grad, y, radial, value=-1) * scale  # y has a fixed length


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2 (So et al. 2021, Primer), also for speed on a CPU."""

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

    Both are (..., T, 1, D / 2); the frequencies fall from 1 towards 1 / 10,000 radians per token.
    """
    pair = torch.arange(0, head_size, 2, device=pos.device, dtype=torch.float32)
    angle = pos[..., None, None].float() * 10000.0 ** (-pair / head_size)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x, cos, sin):
    """Rotate each pair (x1, x2) of x (B, T, H, D) clockwise by its angle."""
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
        self.qkv_proj = None  # replaces these three after quantize.py fused them
        self.dropout = config.dropout

    def forward(self, x, angles, cache=None, mask=None, layer=None):
        projections = self.q_proj, self.k_proj, self.v_proj
        if self.qkv_proj is not None:
            qkv = self.qkv_proj(x)
        elif all(type(proj) is nn.Linear for proj in projections):  # one product is faster
            qkv = F.linear(x, torch.cat([proj.weight for proj in projections]))
        else:  # with LoRA adapters
            qkv = torch.cat([proj(x) for proj in projections], dim=-1)
        qkv = qkv.unflatten(2, (-1, self.head_size))  # (B, T, H + 2 G, D)
        qk, v = qkv.split((self.n_head + self.kv_heads, self.kv_heads), dim=2)
        qk = rms_norm(apply_rotary(qk, *angles))
        q, k = qk.split((self.n_head, self.kv_heads), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, G, T, D) twice
        # no dropout of attention weights, which on a CPU would cost as much as the attention
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
    """The modern architecture from the token ids to the final norm, without the head."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(ModernBlock(config) for _ in range(config.n_layer))
        self.head_size = config.n_embd // config.n_head
        self.dropout = config.dropout
        self.recompute = False  # gradient checkpointing

    def forward(self, idx, pos, cache=None, mask=None):
        x = self.embed_tokens(idx)  # (B, T, C)
        if autocasts_to_bf16(x):
            x = x.bfloat16()  # as in NanoChat: half the memory traffic; float16 could overflow
        x = dropout(rms_norm(x), self.dropout, self.training)
        angles = rotary_cos_sin(pos, self.head_size, x.dtype)
        others = angles, cache, mask
        return rms_norm(run_blocks(self.layers, x, *others, recompute=self.recompute))

    @torch.no_grad()
    def init_weights(self):
        """Blocks start as the identity: output projections are zero; other std is 1 / sqrt(C)."""
        nn.init.normal_(self.embed_tokens.weight, std=0.02)  # a norm follows: only lr / std matters
        for name, parameter in self.layers.named_parameters():
            if name.endswith(('o_proj.weight', 'fc2.weight')):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)


# -----------------------------------------------------------------------------
# the model


def chunked_loss(head, x, targets, rows):
    """The mean cross-entropy of head(x), x (N, C), with the logits of `rows` rows at a time.

    The backward pass computes them again: by count, a tenth more computation for GPT-2 124M, less
    for a larger model, and half the memory of an eager step. torch.compile needs less memory
    without it. None of this was measured on a GPU.
    """

    def total(x, targets):
        return F.cross_entropy(head(x).float(), targets, ignore_index=-1, reduction='sum')

    options = {'use_reentrant': False, 'preserve_rng_state': False}  # nothing random in the head
    sums = [
        torch.utils.checkpoint.checkpoint(total, *chunk, **options)
        for chunk in zip(x.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(sums).sum() / (targets >= 0).sum()


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
            nn.init.normal_(self.lm_head.weight, std=0.001)  # all tokens start equally likely
        self.trunk.init_weights()
        if config.score:
            self.become_reward_model()

    def tie_weights(self) -> None:
        """GPT-2 uses one matrix for the embedding and the head."""
        if self.config.arch == 'gpt2' and not self.config.score:
            self.lm_head.weight = self.transformer.wte.weight

    def become_reward_model(self) -> None:
        """Replace the head by a new one, for the score of a sequence."""
        del self.lm_head
        self.config.score = True
        self.score = nn.Linear(
            self.config.n_embd, 1, bias=False, device=self.embedding.weight.device
        )
        nn.init.normal_(self.score.weight, std=0.02)

    @property
    def trunk(self) -> nn.Module:
        """All but the head."""
        return self.transformer if self.config.arch == 'gpt2' else self.model

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding, whose device and dtype are the model's."""
        return self.transformer.wte if self.config.arch == 'gpt2' else self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h if self.config.arch == 'gpt2' else self.model.layers

    def forward(
        self,
        idx,
        targets=None,
        cache=None,
        lengths=None,
        all_positions=False,
        documents=None,
        ends=None,
        at=None,
        suppressed=None,
    ):
        """(logits, None) without targets, (None, loss) with them: the mean cross-entropy in nats.

        No logits are returned with targets: they are the largest tensor of a training step, and
        would be kept in memory with their gradient.
        idx (B, T): token ids. targets (B, T): the next token of each; -1 is ignored.
        cache: a KVCache of B rows, to which idx is appended.
        lengths (B,): with a cache, the number of tokens in each row before its padding.
        documents (B, T): without a cache, the number of each token's document in the row. Tokens
        attend to their own document only; positions are not reset.
        ends (B,): the position of each row's last token; a reward model then returns (scores (B,),
        None). at (N,): positions in the flattened targets; the loss is then that of each of them
        (N,). suppressed (V,): tokens that are never sampled, and have no share of the probability.
        Logits are (B, T, V); with a cache (B, V), for each row's last token, unless all_positions.
        """
        B, T = idx.shape
        if cache is None:
            pos = torch.arange(T, device=idx.device)  # (T,)
        else:
            pos = cache.extend(B, T, lengths)  # (B, T)
        mask = None if documents is None else document_mask(documents)
        x = self.trunk(idx, pos, cache, mask)  # (B, T, C)
        if ends is not None:  # in float32: autocast would round the product to 16 bits
            last = x[torch.arange(B, device=x.device), ends].float()
            return (last * self.score.weight).sum(1), None
        if cache is not None and not all_positions:  # only the last token of each row
            x = x[:, -1] if lengths is None else x[torch.arange(B, device=x.device), lengths - 1]
        if targets is None:
            return self.head(x), None  # (B, T, V) or (B, V)
        if at is not None:
            return None, self.token_loss(x.flatten(0, 1)[at], targets.flatten()[at], suppressed)
        rows = LOGITS_AT_ONCE // self.config.vocab_size
        if x.is_cuda and targets.numel() > rows and not torch.compiler.is_compiling():
            return None, chunked_loss(self.head, x.flatten(0, 1), targets.flatten(), rows)
        logits = self.head(x).float().flatten(0, 1)  # (B T, V)
        return None, F.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    def token_loss(self, x, targets, suppressed=None):
        """The cross-entropy of each target (N,) in nats, from the trunk's output (N, C)."""
        logits = self.head(x).float()  # (N, V)
        if suppressed is not None:
            logits = logits.masked_fill(suppressed, -math.inf)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction='none')

    def head(self, x):
        """Output of the trunk (..., C) -> logits of the next token (..., V)."""
        logits = self.lm_head(x)
        return logits if self.config.arch == 'gpt2' else 15.0 * torch.tanh(logits.float() / 15.0)

    def block_matrices(self) -> list[nn.Parameter]:
        """The trainable matrices of the blocks, without embeddings and head."""
        inside = [p for block in self.blocks for p in block.parameters()]
        return [p for p in inside if p.dim() == 2 and p.requires_grad]

    def param_groups(self, weight_decay: float, exclude=()) -> list[dict]:
        """Parameter groups for an optimizer: weight decay on matrices and embeddings only."""
        excluded = {id(p) for p in exclude}
        params = [p for p in self.parameters() if p.requires_grad and id(p) not in excluded]
        return [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]

    def num_params(self, trained: bool = False) -> int:
        """Number of parameters without embeddings that are only looked up."""
        lookup = self.transformer.wpe if self.config.arch == 'gpt2' else self.embedding
        counted = [p for p in self.parameters() if p is not lookup.weight]
        return sum(p.numel() for p in counted if p.requires_grad or not trained)

    def flops_per_token(self) -> int:
        """Forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM, appendix B).

        Two of the six are for the gradient of the parameter, which frozen ones do not need. Two
        more, and eight of attention's twelve, are for the gradient of the input, which the first
        blocks do not need if they and the embeddings are frozen.
        """
        c, N = self.config, self.num_params()
        frozen = [] if self.embedding.weight.requires_grad else self.blocks
        frozen = list(takewhile(lambda b: not any(p.requires_grad for p in b.parameters()), frozen))
        matrices = 4 * N + 2 * self.num_params(trained=True)
        matrices -= 2 * sum(p.numel() for block in frozen for p in block.parameters())
        return matrices + (12 * c.n_layer - 8 * len(frozen)) * c.n_embd * c.block_size

    def freeze_lower(self, blocks: int) -> None:
        """Freeze the embeddings and the first blocks; so GPT-2's head, which is its embedding."""
        if blocks > len(self.blocks):
            raise ValueError(f'freeze={blocks}: the model has n_layer={len(self.blocks)}; use less')
        tables = [child for child in self.trunk.children() if isinstance(child, nn.Embedding)]
        for module in (*tables, *self.blocks[:blocks]):
            module.requires_grad_(False)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context of a pretrained model by dropping the positions past block_size."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        if self.config.arch == 'gpt2':
            self.transformer.wpe = nn.Embedding.from_pretrained(
                self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False
            )
