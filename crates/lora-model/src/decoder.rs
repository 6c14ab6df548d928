//! The model: token ids in, hidden states, logits or a loss out. It is a decoder, or by its configuration an encoder.

use crate::batch::TokenBatch;
use crate::block::{Block, Pass, Qkv, normed, scaled};
use crate::cache::KvCache;
use crate::classify::{ClassHead, Head};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::hosted::HostedBase;
use crate::keep::MappedBase;
use crate::layout::{MlpLayout, QkvLayout};
use crate::mlp::{Gated, Mlp};
use crate::norm::NormLayer;
use crate::rope::RotaryTables;
use crate::stage::Stage;
use crate::tokens::TokenAdapters;
use lora_core::{EmbeddingLayer, LinearLayer, TokenRows};
use lora_torch::{HeadPart, cross_entropy, manual_seed, mix_seed, token_losses};
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// Bytes of logits that exist at a time: every chunk reads the head's matrix twice, which must cost little beside the
/// products of its rows.
const LOSS_CHUNK_BYTES: i64 = 96 << 20;
/// No fewer rows than this at a time, and where the head is made dense for every chunk no fewer than that.
const LOSS_CHUNK_ROWS: i64 = 128;
const LOSS_CHUNK_ROWS_CONVERTED: i64 = 512;

/// Rows of logits that exist at a time, in fp32: with a vocabulary of 49k they are 512. `ready` says that the head's matrix
/// is multiplied as it is kept, and not made dense for every chunk.
#[must_use]
pub fn loss_chunk_rows(vocab_size: i64, ready: bool) -> i64 {
    let least = if ready { LOSS_CHUNK_ROWS } else { LOSS_CHUNK_ROWS_CONVERTED };
    (LOSS_CHUNK_BYTES / (4 * vocab_size.max(1))).clamp(least, 8192)
}

/// Whether dropout is on, and what it draws from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Nothing is dropped.
    Eval,
    /// Inputs of adapters are dropped with the probability of the adapter's configuration.
    Train {
        /// Derived from (seed, step, micro-batch).
        seed: u64,
    },
}

/// A decoder, or an encoder ([`crate::Layout::encoder`]), with its weights on one device: all of it, or a [`Stage`].
#[derive(Debug)]
pub struct Decoder {
    /// What it computes.
    pub config: ModelConfig,
    /// Which part of the model is here.
    pub(crate) stage: Stage,
    /// The token table; without rows in a stage behind the first.
    pub embed_tokens: EmbeddingLayer,
    /// Learned positions, in families that have them.
    pub embed_positions: Option<EmbeddingLayer>,
    /// Types of tokens, in families that have them.
    pub embed_types: Option<EmbeddingLayer>,
    /// The norm of the embeddings, in families that have it.
    pub embed_norm: Option<NormLayer>,
    /// The blocks that are here.
    pub blocks: Vec<Block>,
    /// The last norm, in families that have it.
    pub norm: Option<NormLayer>,
    /// What reads the hidden states.
    pub head: Head,
    /// `lora_dropout` of the adapter.
    pub lora_dropout: f64,
    /// What norms and gates give is made once more on the way back, and not kept for the layers that read it
    /// (`gradient_checkpointing = "selective"`).
    pub remake: bool,
    /// Noise on what the token table gives in training, where it is asked for (`crate::noise`).
    pub neftune_noise_alpha: f64,
    /// What blocks read that are computed again waits on the host until then (`gradient_checkpointing = "offload"`).
    pub offload: bool,
    /// The file behind a base that is mapped.
    pub(crate) mapped: Option<Arc<MappedBase>>,
    /// The memory behind a base that is on the host.
    pub(crate) hosted: Option<HostedBase>,
    /// Rows of table and head that an adapter has in the place of the base's.
    pub tokens: TokenAdapters,
}

/// A module, to be looked at.
#[derive(Debug)]
pub enum ModuleRef<'a> {
    /// A linear layer.
    Linear(&'a LinearLayer),
    /// The token table.
    Embedding(&'a EmbeddingLayer),
    /// A norm.
    Norm(&'a NormLayer),
}

/// A module, to be changed.
#[derive(Debug)]
pub enum ModuleMut<'a> {
    /// A linear layer.
    Linear(&'a mut LinearLayer),
    /// The token table.
    Embedding(&'a mut EmbeddingLayer),
    /// A norm.
    Norm(&'a mut NormLayer),
}

/// Lists the modules of a decoder in the order of the forward pass, shared or exclusive.
macro_rules! list_modules {
    ($decoder:expr, $Kind:ident, $iter:ident $(, $m:tt)?) => {{
        let (c, layout) = (& $decoder.config, $decoder.config.layout);
        let mut list = Vec::new();
        if $decoder.stage.is_first() {
            list.push((layout.embed_tokens.to_string(), $Kind::Embedding(& $($m)? $decoder.embed_tokens)));
        }
        if let (Some(path), Some(table)) = (layout.embed_positions, & $($m)? $decoder.embed_positions) {
            list.push((path.to_string(), $Kind::Embedding(table)));
        }
        if let (Some(path), Some(table)) = (layout.embed_types, & $($m)? $decoder.embed_types) {
            list.push((path.to_string(), $Kind::Embedding(table)));
        }
        if let (Some(path), Some(norm)) = (layout.embed_norm, & $($m)? $decoder.embed_norm) {
            list.push((path.to_string(), $Kind::Norm(norm)));
        }
        for (i, b) in $decoder.stage.blocks().zip($decoder.blocks.$iter()) {
            let mut add = |name: &str, module| list.push((c.in_block(i, name), module));
            if let (Some(name), Some(norm)) = (layout.before_attention, & $($m)? b.before_attention) {
                add(name, $Kind::Norm(norm));
            }
            match (layout.qkv, & $($m)? b.qkv) {
                (QkvLayout::Separate([q_name, k_name, v_name]), Qkv::Separate([q, k, v])) => {
                    add(q_name, $Kind::Linear(q));
                    add(k_name, $Kind::Linear(k));
                    add(v_name, $Kind::Linear(v));
                }
                (QkvLayout::Concatenated(name), Qkv::Concatenated(layer)) => add(name, $Kind::Linear(layer)),
                (QkvLayout::PerHead(name), Qkv::PerHead(layer)) => add(name, $Kind::Linear(layer)),
                _ => {}
            }
            if let Some(names) = layout.qk_norm {
                if let Some(norm) = & $($m)? b.q_norm {
                    add(names.q, $Kind::Norm(norm));
                }
                if let Some(norm) = & $($m)? b.k_norm {
                    add(names.k, $Kind::Norm(norm));
                }
            }
            add(layout.o_proj, $Kind::Linear(& $($m)? b.o_proj));
            if let (Some(name), Some(norm)) = (layout.after_attention, & $($m)? b.after_attention) {
                add(name, $Kind::Norm(norm));
            }
            if let (Some(name), Some(norm)) = (layout.before_mlp, & $($m)? b.before_mlp) {
                add(name, $Kind::Norm(norm));
            }
            match (layout.mlp, & $($m)? b.mlp) {
                (MlpLayout::Gated(names), Mlp::Gated(Gated { gate, up, down })) => {
                    add(names[0], $Kind::Linear(gate));
                    add(names[1], $Kind::Linear(up));
                    add(names[2], $Kind::Linear(down));
                }
                (MlpLayout::GatedTogether(names), Mlp::GatedTogether { gate_up, down }) => {
                    add(names[0], $Kind::Linear(gate_up));
                    add(names[1], $Kind::Linear(down));
                }
                (MlpLayout::Plain(names), Mlp::Plain { up, down }) => {
                    add(names[0], $Kind::Linear(up));
                    add(names[1], $Kind::Linear(down));
                }
                (_, Mlp::Experts { router, experts, .. }) => {
                    if let Some(names) = layout.experts {
                        add(names.router, $Kind::Linear(router));
                        for (e, Gated { gate, up, down }) in experts.$iter().enumerate() {
                            let mut part = |p: usize, layer| {
                                add(&format!("{}.{e}.{}", names.experts, names.parts[p]), $Kind::Linear(layer));
                            };
                            part(0, gate);
                            part(1, up);
                            part(2, down);
                        }
                    }
                }
                _ => {}
            }
            if let (Some(name), Some(norm)) = (layout.after_mlp, & $($m)? b.after_mlp) {
                add(name, $Kind::Norm(norm));
            }
        }
        if let (Some(path), Some(norm)) = (layout.final_norm, & $($m)? $decoder.norm) {
            list.push((path.to_string(), $Kind::Norm(norm)));
        }
        match & $($m)? $decoder.head {
            Head::Language(layer) => list.push((layout.lm_head.to_string(), $Kind::Linear(layer))),
            Head::Classes(ClassHead { dense, out }) => {
                if let (Some(path), Some(dense)) = (layout.classifier.dense, dense) {
                    list.push((path.to_string(), $Kind::Linear(dense)));
                }
                list.push((layout.classifier.out.to_string(), $Kind::Linear(out)));
            }
            Head::Elsewhere => {}
        }
        list
    }};
}

impl Decoder {
    /// Which part of the model is here.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Refuses a part of a model where the whole is needed.
    fn check_whole(&self, purpose: &'static str) -> Result<()> {
        match self.stage.is_whole() {
            true => Ok(()),
            false => Err(Error::PartOfModel { blocks: self.stage.blocks(), purpose }),
        }
    }

    /// Every module that is here with its path.
    pub fn modules(&self) -> Vec<(String, ModuleRef<'_>)> {
        list_modules!(self, ModuleRef, iter)
    }

    /// Every module that is here with its path, to be changed.
    pub fn modules_mut(&mut self) -> Vec<(String, ModuleMut<'_>)> {
        list_modules!(self, ModuleMut, iter_mut, mut)
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.embed_tokens.weight.device()
    }

    /// What the model computes in.
    pub fn kind(&self) -> Kind {
        self.embed_tokens.kind
    }

    /// Hidden states after the last norm: of every token, or of `rows` only (which spares the last block the rest).
    ///
    /// # Shapes
    /// `[tokens or rows, hidden]`
    ///
    /// # Errors
    /// What an operation reports.
    pub fn hidden(&self, batch: &TokenBatch, mode: Mode, rows: Option<&Tensor>) -> Result<Tensor> {
        self.check_whole("computing hidden states")?;
        self.final_norm(&self.through_blocks(self.embed_batch(batch, mode)?, batch, mode, rows)?)
    }

    /// What the last of the blocks that are here makes of what the first of them reads, `[tokens, hidden]`; the last of the
    /// model gives `rows` only.
    pub(crate) fn through_blocks(
        &self,
        x: Tensor,
        batch: &TokenBatch,
        mode: Mode,
        rows: Option<&Tensor>,
    ) -> Result<Tensor> {
        let tables = RotaryTables::new(&self.config, &batch.position_ids, batch.longest(), self.kind())?;
        self.through(self.stage.blocks(), x, batch, &tables, mode, rows)
    }

    /// What these of the blocks that are here make of hidden states.
    pub(crate) fn through(
        &self,
        mut blocks: Range<usize>,
        x: Tensor,
        batch: &TokenBatch,
        tables: &RotaryTables,
        mode: Mode,
        rows: Option<&Tensor>,
    ) -> Result<Tensor> {
        blocks.try_fold(x, |x, i| {
            let next = self.block(i, &x, batch, tables, mode, rows)?;
            self.release_block(i)?;
            Ok(next)
        })
    }

    /// What the first block reads: `[tokens, hidden]`.
    pub(crate) fn embed_batch(&self, batch: &TokenBatch, mode: Mode) -> Result<Tensor> {
        if !self.stage.is_first() {
            return Err(Error::PartOfModel { blocks: self.stage.blocks(), purpose: "reading token ids" });
        }
        let noise = self.embedding_noise(&batch.segments, mode)?;
        let x = self.embed(&batch.input_ids, &batch.position_ids, batch.longest(), noise.as_ref())?;
        let x = match (&self.embed_types, &batch.token_types) {
            (None, _) => x,
            (Some(table), Some(types)) => x.f_add(&table.forward(types)?)?,
            (Some(table), None) => x.f_add(&table.forward(&batch.position_ids.f_zeros_like()?)?)?,
        };
        normed(self.embed_norm.as_ref(), &x)
    }

    /// Tokens, and learned positions where the family has them, of texts of up to `longest` tokens: `[tokens, hidden]`. Noise
    /// comes to what the table gives, before anything else is made of it.
    fn embed(&self, ids: &Tensor, positions: &Tensor, longest: i64, noise: Option<&Tensor>) -> Result<Tensor> {
        let looked_up = self.embed_tokens.forward(ids)?;
        let rows = match &self.tokens.embedding {
            Some(tokens) => tokens.in_embedding(&looked_up, ids)?,
            None => looked_up,
        };
        let rows = match noise {
            Some(noise) => rows.f_add(noise)?,
            None => rows,
        };
        let x = scaled(rows, self.config.embedding_scale)?;
        let Some(table) = &self.embed_positions else { return Ok(x) };
        let most = self.config.max_position_embeddings;
        if longest > most {
            let (what, expected) = ("text", format!("of at most {most} tokens, the positions that this model has"));
            return Err(Error::Input { what, expected, got: longest.to_string() });
        }
        let rows = match self.config.position_offset {
            0 => positions.shallow_clone(),
            offset => positions.f_add_scalar(offset)?,
        };
        Ok(x.f_add(&table.forward(&rows)?)?)
    }

    /// Block `i` of the model, which is here; the last one of the model computes `rows` only. Pages of a mapped one stay until they
    /// are let go of ([`Decoder::release_block`]).
    pub(crate) fn block(
        &self,
        i: usize,
        x: &Tensor,
        batch: &TokenBatch,
        tables: &RotaryTables,
        mode: Mode,
        rows: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (dropout, _drawing) = match mode {
            Mode::Train { seed } if self.lora_dropout > 0.0 => {
                // From the block's own seed, so that a recomputed block drops what it dropped before.
                (self.lora_dropout, Some(manual_seed(mix_seed(&[seed, i as u64]))))
            }
            _ => (0.0, None),
        };
        self.enter_block(i)?;
        let rows = rows.filter(|_| i + 1 == self.config.windows.len());
        let block = &self.blocks[i - self.stage.blocks().start];
        let table = tables.of(block.rule.window);
        let pass = Pass { dropout, remake: self.remake };
        block.forward(&self.config, x, table, &batch.segments, pass, rows)
    }

    pub(crate) fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        scaled(normed(self.norm.as_ref(), x)?, self.config.logits_scale)
    }

    /// `[n, hidden]` to `[n, vocab]`.
    ///
    /// # Errors
    /// [`Error::Classifier`] for a model without a language head, or what an operation reports.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.logits_with(hidden, self.tokens.head.as_ref())
    }

    /// Logits of a head with these rows in the place of the base's.
    pub(crate) fn logits_with(&self, hidden: &Tensor, tokens: Option<&TokenRows>) -> Result<Tensor> {
        let logits = self.language_head()?.forward(hidden, 0.0)?;
        let logits = match tokens {
            Some(tokens) => tokens.in_logits(hidden, &logits)?,
            None => logits,
        };
        Ok(match self.config.logits_softcap {
            Some(cap) => logits.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?,
            None => logits,
        })
    }

    /// The head of a language model.
    pub(crate) fn language_head(&self) -> Result<&LinearLayer> {
        match &self.head {
            Head::Language(layer) => Ok(layer),
            Head::Elsewhere => Err(Error::PartOfModel { blocks: self.stage.blocks(), purpose: "giving logits" }),
            Head::Classes(_) => Err(self
                .config
                .check_language("give logits of tokens")
                .err()
                .unwrap_or_else(|| Error::NoClasses { family: self.config.family.clone() })),
        }
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
        self.loss_of(&hidden, batch, None)
    }

    /// The summed loss of hidden states of the trained rows, each times its weight where there are weights.
    pub(crate) fn loss_of(&self, hidden: &Tensor, batch: &TokenBatch, weights: Option<&Tensor>) -> Result<Tensor> {
        if let Some(tokens) = &self.tokens.head {
            let loss = self.loss_with_tokens(hidden, &batch.targets, weights, tokens)?;
            self.release_head()?;
            return Ok(loss);
        }
        if let Head::Classes(head) = &self.head {
            return self.class_loss(&head.forward(hidden)?, batch);
        }
        let Some((head, chunk)) = self.plain_head(hidden)? else {
            let mut losses = self.losses_in_full(hidden, &batch.targets)?;
            if let Some(weights) = weights {
                losses = losses.f_mul(weights)?;
            }
            return Ok(losses.f_sum(losses.kind())?);
        };
        let loss = cross_entropy(hidden, head, &batch.targets, weights, chunk)?;
        self.release_head()?;
        Ok(loss)
    }

    /// The loss of each trained token of a batch, without a gradient, from hidden states of the trained rows.
    ///
    /// # Shapes
    /// `[trained]`, fp32 or fp64.
    pub(crate) fn token_losses_of(&self, hidden: &Tensor, batch: &TokenBatch) -> Result<Tensor> {
        no_grad(|| {
            let head = if self.tokens.head.is_none() { self.plain_head(hidden)? } else { None };
            let Some((head, chunk)) = head else { return self.losses_in_full(hidden, &batch.targets) };
            let losses = token_losses(hidden, head, &batch.targets, chunk)?;
            self.release_head()?;
            Ok(losses)
        })
    }

    /// The head where losses can be taken from hidden states, and the rows to take at a time.
    fn plain_head(&self, hidden: &Tensor) -> Result<Option<(HeadPart<'_>, i64)>> {
        let Some(p) = self.language_head()?.as_plain() else { return Ok(None) };
        let ready = p.weight.plain().is_some_and(|w| w.kind() == hidden.kind());
        let softcap = self.config.logits_softcap;
        let head = HeadPart { weight: p.weight, bias: p.bias, adapter: p.adapter, softcap };
        Ok(Some((head, loss_chunk_rows(p.weight.size()[0], ready))))
    }

    /// The loss of each row from logits in full, as those of another layer: a head with DoRA, or with rows of its own.
    fn losses_in_full(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let logits = self.logits(hidden)?;
        let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let chosen = logits.f_log_softmax(-1, wide)?.f_gather(1, &targets.f_unsqueeze(1)?, false)?;
        Ok(chosen.f_squeeze_dim(1)?.f_neg()?)
    }

    /// Logits of the last of `ids`, which follow what is in `cache`; where it holds several texts, `ids` is the next token of
    /// each.
    ///
    /// # Shapes
    /// `[texts, vocab]`
    ///
    /// # Errors
    /// What an operation reports, or when the cache is full.
    pub fn next_logits(&self, ids: &[i64], cache: &mut KvCache) -> Result<Tensor> {
        self.check_whole("writing text")?;
        let (start, texts) = (cache.len(), cache.texts());
        let new = ids.len() as i64 / texts;
        let positions = Tensor::f_arange_start(start, start + new, (Kind::Int64, self.device()))?.f_repeat([texts])?;
        let tables = RotaryTables::new(&self.config, &positions, start + new, self.kind())?;
        let ids = Tensor::f_from_slice(ids)?.f_to_device(self.device())?;
        let mut x = self.embed(&ids, &positions, start + new, None)?;
        for (i, (block, layer)) in self.blocks.iter().zip(&mut cache.layers).enumerate() {
            self.enter_block(i)?;
            x = block.forward_cached(&self.config, &x, tables.of(block.rule.window), layer)?;
            self.release_block(i)?;
        }
        let last = x.f_view([texts, new, -1])?.f_select(1, new - 1)?;
        self.logits(&self.final_norm(&last)?)
    }
}
