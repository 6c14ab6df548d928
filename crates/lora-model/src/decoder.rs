//! The decoder: token ids in, hidden states, logits or a loss out.

use crate::batch::TokenBatch;
use crate::block::Block;
use crate::cache::KvCache;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::names::{EMBED_TOKENS, FINAL_NORM, LM_HEAD, in_block};
use crate::rope::RotaryTable;
use lora_core::{EmbeddingLayer, LinearLayer};
use lora_torch::{HeadPart, cross_entropy, manual_seed, mix_seed, rms_norm};
use tch::{Device, Kind, Tensor};

/// Logits of this many rows exist at a time; 128 rows of a vocabulary of 128k are 64 MB in fp32.
pub const LOSS_CHUNK_ROWS: i64 = 128;

/// Whether dropout is on, and what it draws from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Nothing is dropped.
    Eval,
    /// Inputs of adapters are dropped with the probability of the adapter's configuration.
    Train {
        /// Derived from (seed, step, micro-batch, rank).
        seed: u64,
    },
}

/// A decoder with its weights on one device.
#[derive(Debug)]
pub struct Decoder {
    /// What it computes.
    pub config: ModelConfig,
    /// The token table.
    pub embed_tokens: EmbeddingLayer,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// `[hidden]`: the last norm.
    pub norm: Tensor,
    /// `[vocab, hidden]`; shares the table's weight when tied.
    pub lm_head: LinearLayer,
    /// `lora_dropout` of the adapter.
    pub lora_dropout: f64,
}

/// A module, to be looked at.
#[derive(Debug)]
pub enum ModuleRef<'a> {
    /// A linear layer.
    Linear(&'a LinearLayer),
    /// The token table.
    Embedding(&'a EmbeddingLayer),
    /// The weight of a norm.
    Norm(&'a Tensor),
}

/// A module, to be changed.
#[derive(Debug)]
pub enum ModuleMut<'a> {
    /// A linear layer.
    Linear(&'a mut LinearLayer),
    /// The token table.
    Embedding(&'a mut EmbeddingLayer),
    /// The weight of a norm.
    Norm(&'a mut Tensor),
}

/// Lists the modules of a decoder in the order of the forward pass, shared or exclusive.
macro_rules! list_modules {
    ($decoder:expr, $Kind:ident, $iter:ident $(, $m:tt)?) => {{
        let mut list = vec![(EMBED_TOKENS.to_string(), $Kind::Embedding(& $($m)? $decoder.embed_tokens))];
        for (i, b) in $decoder.blocks.$iter().enumerate() {
            let mut add = |name: &str, module| list.push((in_block(i, name), module));
            add("input_layernorm", $Kind::Norm(& $($m)? b.input_layernorm));
            add("self_attn.q_proj", $Kind::Linear(& $($m)? b.q_proj));
            add("self_attn.k_proj", $Kind::Linear(& $($m)? b.k_proj));
            add("self_attn.v_proj", $Kind::Linear(& $($m)? b.v_proj));
            if let Some(norm) = & $($m)? b.q_norm {
                add("self_attn.q_norm", $Kind::Norm(norm));
            }
            if let Some(norm) = & $($m)? b.k_norm {
                add("self_attn.k_norm", $Kind::Norm(norm));
            }
            add("self_attn.o_proj", $Kind::Linear(& $($m)? b.o_proj));
            add("post_attention_layernorm", $Kind::Norm(& $($m)? b.post_attention_layernorm));
            add("mlp.gate_proj", $Kind::Linear(& $($m)? b.gate_proj));
            add("mlp.up_proj", $Kind::Linear(& $($m)? b.up_proj));
            add("mlp.down_proj", $Kind::Linear(& $($m)? b.down_proj));
        }
        list.push((FINAL_NORM.to_string(), $Kind::Norm(& $($m)? $decoder.norm)));
        list.push((LM_HEAD.to_string(), $Kind::Linear(& $($m)? $decoder.lm_head)));
        list
    }};
}

impl Decoder {
    /// Every module with its path.
    pub fn modules(&self) -> Vec<(String, ModuleRef<'_>)> {
        list_modules!(self, ModuleRef, iter)
    }

    /// Every module with its path, to be changed.
    pub fn modules_mut(&mut self) -> Vec<(String, ModuleMut<'_>)> {
        list_modules!(self, ModuleMut, iter_mut, mut)
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.embed_tokens.weight.device()
    }

    /// What the model computes in.
    pub fn kind(&self) -> Kind {
        self.embed_tokens.weight.kind()
    }

    /// Hidden states after the last norm: of every token, or of `rows` only (which spares the last block the rest).
    ///
    /// # Shapes
    /// `[tokens or rows, hidden]`
    ///
    /// # Errors
    /// What an operation reports.
    pub fn hidden(&self, batch: &TokenBatch, mode: Mode, rows: Option<&Tensor>) -> Result<Tensor> {
        let table = RotaryTable::new(&self.config, &batch.position_ids, batch.longest(), self.kind())?;
        let mut x = self.embed_tokens.forward(&batch.input_ids)?;
        for i in 0..self.blocks.len() {
            x = self.block(i, &x, batch, &table, mode, rows)?;
        }
        self.final_norm(&x)
    }

    /// Block `i`; the last one computes `rows` only.
    pub(crate) fn block(
        &self,
        i: usize,
        x: &Tensor,
        batch: &TokenBatch,
        table: &RotaryTable,
        mode: Mode,
        rows: Option<&Tensor>,
    ) -> Result<Tensor> {
        let dropout = match mode {
            Mode::Train { seed } if self.lora_dropout > 0.0 => {
                // From the block's own seed, so that a recomputed block drops what it dropped before.
                manual_seed(mix_seed(&[seed, i as u64]));
                self.lora_dropout
            }
            _ => 0.0,
        };
        let rows = rows.filter(|_| i + 1 == self.blocks.len());
        self.blocks[i].forward(&self.config, x, table, &batch.segments, dropout, rows)
    }

    pub(crate) fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(x, &self.norm, self.config.rms_norm_eps)?)
    }

    /// `[n, hidden]` to `[n, vocab]`.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.lm_head.forward(hidden, 0.0)?)
    }

    /// The summed loss over the trained tokens of a batch, from hidden states of the trained rows only.
    ///
    /// # Shapes
    /// A scalar, fp32.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn loss(&self, batch: &TokenBatch, mode: Mode) -> Result<Tensor> {
        let hidden = self.hidden(batch, mode, Some(&batch.target_rows))?;
        self.loss_of(&hidden, batch)
    }

    /// The summed loss of hidden states of the trained rows.
    pub(crate) fn loss_of(&self, hidden: &Tensor, batch: &TokenBatch) -> Result<Tensor> {
        let p = self.lm_head.projection();
        let head = HeadPart { weight: p.weight, bias: p.bias, adapter: p.adapter };
        Ok(cross_entropy(hidden, head, &batch.targets, LOSS_CHUNK_ROWS)?)
    }

    /// Logits of the last of `ids`, which follow what is in `cache`.
    ///
    /// # Shapes
    /// `[vocab]`
    ///
    /// # Errors
    /// What an operation reports, or when the cache is full.
    pub fn next_logits(&self, ids: &[i64], cache: &mut KvCache) -> Result<Tensor> {
        let n = ids.len() as i64;
        let table = RotaryTable::range(&self.config, cache.len(), n, self.kind(), self.device())?;
        let mut x = self.embed_tokens.forward(&Tensor::f_from_slice(ids)?.f_to_device(self.device())?)?;
        for (block, layer) in self.blocks.iter().zip(&mut cache.layers) {
            x = block.forward_cached(&self.config, &x, &table, layer)?;
        }
        let last = self.final_norm(&x.f_narrow(0, n - 1, 1)?)?;
        Ok(self.logits(&last)?.f_squeeze_dim(0)?)
    }
}
