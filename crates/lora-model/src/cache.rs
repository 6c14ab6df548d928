//! Keys and values of texts that are being generated, all of them of the same length.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use lora_torch::AttentionRule;
use tch::{Device, Kind, Tensor};

/// The cache of one block: room for `capacity` positions of each text, the first `len` of them filled.
#[derive(Debug)]
pub struct LayerCache {
    /// `[texts, capacity, kv_heads, head_dim]`, and `v` like it.
    k: Tensor,
    v: Tensor,
    len: i64,
}

impl LayerCache {
    fn new(c: &ModelConfig, capacity: i64, kind: Kind, device: Device) -> Result<Self> {
        let room = || Tensor::f_empty([1, capacity, c.num_key_value_heads, c.head_dim], (kind, device));
        Ok(Self { k: room()?, v: room()?, len: 0 })
    }

    /// The same text so many times.
    fn repeated(&self, texts: i64) -> Result<Self> {
        let copies = |t: &Tensor| -> Result<Tensor> { Ok(t.f_repeat([texts, 1, 1, 1])?) };
        Ok(Self { k: copies(&self.k)?, v: copies(&self.v)?, len: self.len })
    }

    /// Of the texts these, by their places.
    fn keep(&mut self, texts: &Tensor) -> Result<()> {
        (self.k, self.v) = (self.k.f_index_select(0, texts)?, self.v.f_index_select(0, texts)?);
        Ok(())
    }

    /// Appends `k` and `v` `[texts · new, kv_heads, head_dim]` and lets `q` `[texts · new, heads, head_dim]` attend to all of
    /// its text that it may see. The result is `[texts · new, heads · head_dim]`.
    pub(crate) fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, rule: AttentionRule) -> Result<Tensor> {
        let AttentionRule { scale, window, softcap, .. } = rule;
        let texts = self.k.size()[0];
        let new = q.size()[0] / texts;
        let end = self.len + new;
        if end > self.k.size()[1] {
            return Err(Error::Input {
                what: "position",
                expected: format!("below {}", self.k.size()[1]),
                got: end.to_string(),
            });
        }
        let by_text = |t: &Tensor| -> Result<Tensor> { Ok(t.f_reshape([texts, new, t.size()[1], t.size()[2]])?) };
        self.k.f_narrow(1, self.len, new)?.f_copy_(&by_text(k)?)?;
        self.v.f_narrow(1, self.len, new)?.f_copy_(&by_text(v)?)?;
        // The first new query sees no key before this one, and later ones none before theirs.
        let first = window.map_or(0, |w| (self.len + 1 - w).max(0));
        let mask = if new == 1 { None } else { Some(mask(self.len, new, first, end, window, q)?) };
        let heads_first = |t: &Tensor| -> Result<Tensor> { Ok(t.f_transpose(1, 2)?) };
        let q = heads_first(&by_text(q)?)?;
        let (k, v) = (self.k.f_narrow(1, first, end - first)?, self.v.f_narrow(1, first, end - first)?);
        let (k, v) = (heads_first(&k)?, heads_first(&v)?);
        let out = match softcap {
            Some(cap) => capped(&q, &k, &v, mask.as_ref(), scale, cap)?,
            None => Tensor::f_scaled_dot_product_attention(&q, &k, &v, mask.as_ref(), 0.0, false, scale, true)?,
        };
        self.len = end;
        Ok(heads_first(&out)?.f_reshape([texts * new, -1])?)
    }
}

/// Attention with capped scores; `q` `[texts, heads, new, d]`, `k` and `v` `[texts, kv_heads, keys, d]`, the result is like `q`.
fn capped(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: f64, cap: f64) -> Result<Tensor> {
    let groups = q.size()[1] / k.size()[1];
    let spread = |t: &Tensor| -> Result<Tensor> { Ok(t.f_repeat_interleave_self_int(groups, 1, None)?) };
    let scores = q.f_matmul(&spread(k)?.f_transpose(2, 3)?)?;
    let mut scores = scores.f_mul_scalar(scale / cap)?.f_tanh()?.f_mul_scalar(cap)?;
    if let Some(seen) = mask {
        scores = scores.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?;
    }
    Ok(scores.f_softmax(-1, q.kind())?.f_matmul(&spread(v)?)?)
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
    /// Room for one text of `capacity` tokens.
    ///
    /// # Errors
    /// What the allocator reports.
    pub fn new(c: &ModelConfig, capacity: i64, kind: Kind, device: Device) -> Result<Self> {
        Ok(Self {
            layers: c.windows.iter().map(|_| LayerCache::new(c, capacity, kind, device)).collect::<Result<_>>()?,
        })
    }

    /// The one text of the cache so many times, to be continued in so many ways.
    ///
    /// # Errors
    /// What the allocator reports.
    pub fn repeated(&self, texts: i64) -> Result<Self> {
        Ok(Self { layers: self.layers.iter().map(|layer| layer.repeated(texts)).collect::<Result<_>>()? })
    }

    /// Of the texts these, by their places: the others are at their end.
    ///
    /// # Errors
    /// A place that is none.
    pub fn keep(&mut self, texts: &[i64]) -> Result<()> {
        let Some(layer) = self.layers.first() else { return Ok(()) };
        let texts = Tensor::f_from_slice(texts)?.f_to_device(layer.k.device())?;
        self.layers.iter_mut().try_for_each(|layer| layer.keep(&texts))
    }

    /// Texts in the cache.
    pub fn texts(&self) -> i64 {
        self.layers.first().map_or(1, |l| l.k.size()[0])
    }

    /// Tokens of each text in the cache.
    pub fn len(&self) -> i64 {
        self.layers.first().map_or(0, |l| l.len)
    }

    /// Whether the cache is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
