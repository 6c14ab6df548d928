//! One block: attention and a gated MLP, each behind an RMSNorm and beside the residual stream.

use crate::cache::LayerCache;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::rope::RotaryTable;
use lora_core::{LinearLayer, forward_many};
use lora_torch::{Segments, attention, rms_norm, rotary, swiglu};
use tch::Tensor;

/// Weights of one block.
#[derive(Debug)]
pub struct Block {
    /// `[hidden]`
    pub input_layernorm: Tensor,
    /// `[heads · head_dim, hidden]`
    pub q_proj: LinearLayer,
    /// `[kv_heads · head_dim, hidden]`
    pub k_proj: LinearLayer,
    /// `[kv_heads · head_dim, hidden]`
    pub v_proj: LinearLayer,
    /// `[head_dim]`, for Qwen3
    pub q_norm: Option<Tensor>,
    /// `[head_dim]`, for Qwen3
    pub k_norm: Option<Tensor>,
    /// `[hidden, heads · head_dim]`
    pub o_proj: LinearLayer,
    /// `[hidden]`
    pub post_attention_layernorm: Tensor,
    /// `[intermediate, hidden]`
    pub gate_proj: LinearLayer,
    /// `[intermediate, hidden]`
    pub up_proj: LinearLayer,
    /// `[hidden, intermediate]`
    pub down_proj: LinearLayer,
    /// How many keys a query sees.
    pub window: Option<i64>,
}

impl Block {
    /// `[tokens, hidden]` to the same, or to `[rows, hidden]` when only `rows` are needed afterwards.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn forward(
        &self,
        c: &ModelConfig,
        x: &Tensor,
        table: &RotaryTable,
        segments: &Segments,
        dropout: f64,
        rows: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (q, k, v) = self.qkv(c, x, table, dropout)?;
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        let mixed = attention(&q, &k, &v, segments, scale, self.window)?.f_flatten(1, 2)?;
        match rows {
            Some(rows) => self.rest(c, &x.f_index_select(0, rows)?, &mixed.f_index_select(0, rows)?, dropout),
            None => self.rest(c, x, &mixed, dropout),
        }
    }

    /// The next `x` `[new, hidden]` of one text whose earlier keys and values are in `cache`.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn forward_cached(
        &self,
        c: &ModelConfig,
        x: &Tensor,
        table: &RotaryTable,
        cache: &mut LayerCache,
    ) -> Result<Tensor> {
        let (q, k, v) = self.qkv(c, x, table, 0.0)?;
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        let mixed = cache.attend(&q, &k, &v, scale, self.window)?;
        self.rest(c, x, &mixed, 0.0)
    }

    /// Queries, keys and values, `[tokens, heads, head_dim]` each, rotated.
    fn qkv(&self, c: &ModelConfig, x: &Tensor, table: &RotaryTable, dropout: f64) -> Result<(Tensor, Tensor, Tensor)> {
        let normed = rms_norm(x, &self.input_layernorm, c.rms_norm_eps)?;
        let [q, k, v] = forward_many(&normed, [&self.q_proj, &self.k_proj, &self.v_proj], dropout)?;
        let heads = |t: Tensor, norm: Option<&Tensor>| -> Result<Tensor> {
            let t = t.f_view([-1, t.size()[1] / c.head_dim, c.head_dim])?;
            Ok(match norm {
                Some(weight) => rms_norm(&t, weight, c.rms_norm_eps)?,
                None => t,
            })
        };
        let q = rotary(&heads(q, self.q_norm.as_ref())?, &table.cos, &table.sin)?;
        let k = rotary(&heads(k, self.k_norm.as_ref())?, &table.cos, &table.sin)?;
        Ok((q, k, heads(v, None)?))
    }

    /// Output projection, residual, MLP, residual.
    fn rest(&self, c: &ModelConfig, x: &Tensor, mixed: &Tensor, dropout: f64) -> Result<Tensor> {
        let x = x.f_add(&self.o_proj.forward(mixed, dropout)?)?;
        let normed = rms_norm(&x, &self.post_attention_layernorm, c.rms_norm_eps)?;
        let [gate, up] = forward_many(&normed, [&self.gate_proj, &self.up_proj], dropout)?;
        let inner = swiglu(&gate, &up)?;
        Ok(x.f_add(&self.down_proj.forward(&inner, dropout)?)?)
    }
}
