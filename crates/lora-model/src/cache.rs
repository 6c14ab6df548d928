//! Keys and values of a text that is being generated.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use lora_torch::AttentionRule;
use tch::{Device, Kind, Tensor};

/// The cache of one block: room for `capacity` positions, the first `len` of them filled.
#[derive(Debug)]
pub struct LayerCache {
    k: Tensor,
    v: Tensor,
    len: i64,
}

impl LayerCache {
    fn new(c: &ModelConfig, capacity: i64, kind: Kind, device: Device) -> Result<Self> {
        let room = || Tensor::f_empty([capacity, c.num_key_value_heads, c.head_dim], (kind, device));
        Ok(Self { k: room()?, v: room()?, len: 0 })
    }

    /// Appends `k` and `v` `[new, kv_heads, head_dim]` and lets `q` `[new, heads, head_dim]` attend to all that it may see.
    /// The result is `[new, heads · head_dim]`.
    pub(crate) fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, rule: AttentionRule) -> Result<Tensor> {
        let AttentionRule { scale, window, softcap, .. } = rule;
        let new = q.size()[0];
        let end = self.len + new;
        if end > self.k.size()[0] {
            return Err(Error::Input {
                what: "position",
                expected: format!("below {}", self.k.size()[0]),
                got: end.to_string(),
            });
        }
        self.k.f_narrow(0, self.len, new)?.f_copy_(k)?;
        self.v.f_narrow(0, self.len, new)?.f_copy_(v)?;
        // The first new query sees no key before this one, and later ones none before theirs.
        let first = window.map_or(0, |w| (self.len + 1 - w).max(0));
        let heads_first = |t: &Tensor| -> Result<Tensor> { Ok(t.f_transpose(0, 1)?.f_unsqueeze(0)?) };
        let (keys, values) = (self.k.f_narrow(0, first, end - first)?, self.v.f_narrow(0, first, end - first)?);
        let alone = new == 1;
        let mask = if alone { None } else { Some(mask(self.len, new, first, end, window, q)?) };
        if let Some(cap) = softcap {
            let out = capped(q, &keys, &values, mask.as_ref(), scale, cap)?;
            self.len = end;
            return Ok(out.f_reshape([new, -1])?);
        }
        let out = Tensor::f_scaled_dot_product_attention(
            &heads_first(q)?,
            &heads_first(&keys)?,
            &heads_first(&values)?,
            mask.as_ref(),
            0.0,
            false,
            scale,
            true,
        )?;
        self.len = end;
        Ok(out.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_reshape([new, -1])?)
    }
}

/// Attention with capped scores; `q` `[new, heads, d]`, `keys` and `values` `[keys, kv_heads, d]`, the result is like `q`.
fn capped(q: &Tensor, keys: &Tensor, values: &Tensor, mask: Option<&Tensor>, scale: f64, cap: f64) -> Result<Tensor> {
    let groups = q.size()[1] / keys.size()[1];
    let spread =
        |t: &Tensor| -> Result<Tensor> { Ok(t.f_repeat_interleave_self_int(groups, 1, None)?.f_transpose(0, 1)?) };
    let scores = q.f_transpose(0, 1)?.f_matmul(&spread(keys)?.f_transpose(1, 2)?)?;
    let mut scores = scores.f_mul_scalar(scale / cap)?.f_tanh()?.f_mul_scalar(cap)?;
    if let Some(seen) = mask {
        scores = scores.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?;
    }
    Ok(scores.f_softmax(-1, q.kind())?.f_matmul(&spread(values)?)?.f_transpose(0, 1)?)
}

/// `[new, keys]` bool: query at `past + i` sees keys up to itself, within the window.
fn mask(past: i64, new: i64, first: i64, end: i64, window: Option<i64>, like: &Tensor) -> Result<Tensor> {
    let on = (Kind::Int64, like.device());
    let distance = Tensor::f_arange_start(past, past + new, on)?
        .f_unsqueeze(1)?
        .f_sub(&Tensor::f_arange_start(first, end, on)?.f_unsqueeze(0)?)?;
    let seen = distance.f_ge(0)?;
    Ok(match window {
        Some(w) => seen.f_logical_and(&distance.f_lt(w)?)?,
        None => seen,
    })
}

/// The caches of all blocks.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
}

impl KvCache {
    /// Room for a text of `capacity` tokens.
    ///
    /// # Errors
    /// What the allocator reports.
    pub fn new(c: &ModelConfig, capacity: i64, kind: Kind, device: Device) -> Result<Self> {
        Ok(Self {
            layers: c.windows.iter().map(|_| LayerCache::new(c, capacity, kind, device)).collect::<Result<_>>()?,
        })
    }

    /// Tokens in the cache.
    pub fn len(&self) -> i64 {
        self.layers.first().map_or(0, |l| l.len)
    }

    /// Whether the cache is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
