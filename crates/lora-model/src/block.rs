//! One block: attention and an MLP beside the residual stream, with the norms that the family has.

use crate::cache::LayerCache;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::mlp::Mlp;
use crate::norm::{NormLayer, Read};
use crate::rope::RotaryTable;
use lora_core::{LinearLayer, forward_many_of};
use lora_torch::{AttentionRule, Segments, attention, rotary};
use tch::Tensor;

/// Projections of queries, keys and values.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one for each block, and no list of them")]
pub enum Qkv {
    /// Three layers: `[heads · head_dim, hidden]`, and twice `[kv_heads · head_dim, hidden]`.
    Separate([LinearLayer; 3]),
    /// One layer whose output is all queries, then all keys, then all values.
    Concatenated(LinearLayer),
    /// One layer whose output is query, key and value of each head in turn.
    PerHead(LinearLayer),
}

/// Weights of one block.
#[derive(Debug)]
pub struct Block {
    /// The norm of what the attention reads.
    pub before_attention: Option<NormLayer>,
    /// Queries, keys and values.
    pub qkv: Qkv,
    /// Of each head, or of all together.
    pub q_norm: Option<NormLayer>,
    /// Of each head, or of all together.
    pub k_norm: Option<NormLayer>,
    /// `[hidden, heads · head_dim]`
    pub o_proj: LinearLayer,
    /// The norm of what the attention gives.
    pub after_attention: Option<NormLayer>,
    /// The norm of what the MLP reads.
    pub before_mlp: Option<NormLayer>,
    /// The MLP.
    pub mlp: Mlp,
    /// The norm of what the MLP gives.
    pub after_mlp: Option<NormLayer>,
    /// How the scores are masked and scaled.
    pub rule: AttentionRule,
}

/// How the layers of a block are applied in one pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// The probability with which an input of an adapter is dropped; 0 in evaluation.
    pub dropout: f64,
    /// What norms and gates give is made once more on the way back, and not kept for the layers that read it.
    pub remake: bool,
}

impl Block {
    /// `[tokens, hidden]` to the same, or to `[rows, hidden]` when only `rows` are needed afterwards. Without a table
    /// nothing is rotated.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn forward(
        &self,
        c: &ModelConfig,
        x: &Tensor,
        table: Option<&RotaryTable>,
        segments: &Segments,
        pass: Pass,
        rows: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (q, k, v) = self.qkv(c, x, table, pass)?;
        let mixed = attention(&q, &k, &v, segments, self.rule)?.f_flatten(1, 2)?;
        match rows {
            Some(rows) => self.rest(c, &x.f_index_select(0, rows)?, &mixed.f_index_select(0, rows)?, pass),
            None => self.rest(c, x, &mixed, pass),
        }
    }

    /// The next `x` `[texts · new, hidden]` of texts whose earlier keys and values are in `cache`.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn forward_cached(
        &self,
        c: &ModelConfig,
        x: &Tensor,
        table: Option<&RotaryTable>,
        cache: &mut LayerCache,
    ) -> Result<Tensor> {
        let (q, k, v) = self.qkv(c, x, table, Pass::default())?;
        let mixed = cache.attend(&q, &k, &v, self.rule)?;
        self.rest(c, x, &mixed, Pass::default())
    }

    /// Queries, keys and values, `[tokens, heads, head_dim]` each, normalised and rotated.
    fn qkv(
        &self,
        c: &ModelConfig,
        x: &Tensor,
        table: Option<&RotaryTable>,
        pass: Pass,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let read = Read::of(self.before_attention.as_ref(), x)?;
        let (x, origin, dropout) = (read.tensor(), read.origin(pass.remake), pass.dropout);
        let (d, heads, kv) = (c.head_dim, c.num_attention_heads, c.num_key_value_heads);
        let [q, k, v] = match &self.qkv {
            Qkv::Separate([q, k, v]) => forward_many_of(x, origin, [q, k, v], dropout)?,
            Qkv::Concatenated(layer) => {
                let [all] = forward_many_of(x, origin, [layer], dropout)?;
                let part = |start: i64, n: i64| all.f_narrow(1, start * d, n * d);
                [part(0, heads)?, part(heads, kv)?, part(heads + kv, kv)?]
            }
            Qkv::PerHead(layer) => {
                let [all] = forward_many_of(x, origin, [layer], dropout)?;
                let all = all.f_view([-1, heads, 3, d])?;
                [all.f_select(2, 0)?, all.f_select(2, 1)?, all.f_select(2, 2)?]
            }
        };
        let whole = c.layout.qk_norm.is_some_and(|n| n.whole);
        let prepared = |t: Tensor, norm: Option<&NormLayer>| -> Result<Tensor> {
            let t = if whole { normed(norm, &t)? } else { t };
            let t = t.f_reshape([-1, t.numel() as i64 / t.size()[0].max(1) / d, d])?;
            let t = if whole { t } else { normed(norm, &t)? };
            Ok(match table {
                Some(table) => rotary(&t, &table.cos, &table.sin)?,
                None => t,
            })
        };
        let v = v.f_reshape([-1, kv, d])?;
        Ok((prepared(q, self.q_norm.as_ref())?, prepared(k, self.k_norm.as_ref())?, v))
    }

    /// Output projection, MLP, and the residual stream around both.
    fn rest(&self, c: &ModelConfig, x: &Tensor, mixed: &Tensor, pass: Pass) -> Result<Tensor> {
        if c.layout.encoder {
            let added = x.f_add(&self.o_proj.forward(mixed, pass.dropout)?)?;
            let x = Read::Plain(normed(self.after_attention.as_ref(), &added)?);
            let given = self.mlp.forward(c, &x, pass)?;
            return normed(self.after_mlp.as_ref(), &x.tensor().f_add(&given)?);
        }
        let attended = normed(self.after_attention.as_ref(), &self.o_proj.forward(mixed, pass.dropout)?)?;
        let attended = scaled(attended, c.residual_scale)?;
        let added = x.f_add(&attended)?;
        let read = Read::of(self.before_mlp.as_ref(), if c.parallel { x } else { &added })?;
        let given = normed(self.after_mlp.as_ref(), &self.mlp.forward(c, &read, pass)?)?;
        Ok(added.f_add(&scaled(given, c.residual_scale)?)?)
    }
}

pub(crate) fn normed(norm: Option<&NormLayer>, x: &Tensor) -> Result<Tensor> {
    norm.map_or_else(|| Ok(x.shallow_clone()), |n| n.forward(x))
}

pub(crate) fn scaled(x: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 { Ok(x) } else { Ok(x.f_mul_scalar(factor)?) }
}
