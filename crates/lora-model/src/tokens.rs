//! Tokens whose rows of the embedding, and of a head that shares it, are trained while the rest is frozen: PEFT's
//! `trainable_token_indices`.

use crate::config::ModelConfig;
use crate::decoder::{Decoder, loss_chunk_rows};
use crate::error::{Error, Result};
use crate::inject::Parameter;
use lora_core::TokenRows;
use lora_format::{AdapterConfig, AdapterFolder, AdapterModule};
use lora_torch::backward;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// The key that these tokens are named by.
const FIELD: &str = "trainable_token_indices";

/// Rows in the place of the base's.
#[derive(Debug, Default)]
pub struct TokenAdapters {
    /// Of the token table.
    pub embedding: Option<TokenRows>,
    /// Of the head: those of the table where the two are tied, or rows of its own.
    pub head: Option<TokenRows>,
}

impl TokenAdapters {
    /// Whether the base's rows all stand.
    pub fn is_empty(&self) -> bool {
        self.embedding.is_none() && self.head.is_none()
    }

    /// Whether the head holds the rows of the table.
    fn is_shared(&self) -> bool {
        matches!((&self.embedding, &self.head), (Some(e), Some(h)) if h.shares(e))
    }

    /// The rows of several adapters together.
    ///
    /// # Errors
    /// [`Error::Core`] where two of them replace the same row.
    pub(crate) fn together(list: &[&TokenAdapters], vocab: i64) -> Result<Self> {
        let joined = |part: fn(&TokenAdapters) -> Option<&TokenRows>| -> Result<Option<TokenRows>> {
            let rows: Vec<&TokenRows> = list.iter().filter_map(|t| part(t)).collect();
            match rows[..] {
                [] => Ok(None),
                [one] => Ok(Some(one.shared())),
                _ => {
                    let ids: Vec<i64> = rows.iter().flat_map(|r| r.ids.iter().copied()).collect();
                    let rows = Tensor::f_cat(&rows.iter().map(|r| &r.rows).collect::<Vec<_>>(), 0)?;
                    Ok(Some(TokenRows::new(&ids, rows, vocab)?))
                }
            }
        };
        Ok(Self { embedding: joined(|t| t.embedding.as_ref())?, head: joined(|t| t.head.as_ref())? })
    }
}

/// Which rows are trained, decided before any weight is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenPlan {
    /// Rows of the token table.
    pub embedding: Option<Vec<i64>>,
    /// Rows of the head that are its own.
    pub head: Option<Vec<i64>>,
    /// Whether the head has the rows of the table.
    pub tied: bool,
    /// The width of a row.
    pub dim: i64,
}

impl TokenPlan {
    /// How many numbers are trained.
    pub fn trained(&self) -> i64 {
        let of = |ids: &Option<Vec<i64>>| ids.as_ref().map_or(0, |ids| ids.len() as i64 * self.dim);
        of(&self.embedding) + of(&self.head)
    }
}

/// What `trainable_token_indices` means for a model, by PEFT's rules: a tied head follows the table, unless both are named
/// and their tokens differ, which `ensure_weight_tying` forbids.
///
/// # Errors
/// [`Error::Target`] for a name that is neither, [`Error::Adapter`] for an id outside the vocabulary or a contradiction.
pub(crate) fn plan_tokens(model: &ModelConfig, config: &AdapterConfig) -> Result<Option<TokenPlan>> {
    let Some(indices) = &config.trainable_token_indices else { return Ok(None) };
    let layout = model.layout;
    let refuse = |value: String, reason: &str| Error::Adapter { field: FIELD, value, reason: reason.into() };
    let (mut embedding, mut head): (Option<Vec<i64>>, Option<Vec<i64>>) = (None, None);
    for (name, ids) in indices.lists() {
        let twice = ids.iter().enumerate().find(|(i, id)| ids[..*i].contains(id));
        if let Some((_, id)) = twice {
            return Err(refuse(id.to_string(), &format!("token {id} is there twice, and has one row; name it once")));
        }
        if ids.is_empty() {
            return Err(refuse("[]".into(), "name at least one token, or leave the key out"));
        }
        if let Some(id) = ids.iter().find(|id| !(0..model.vocab_size).contains(id)) {
            let reason = format!(
                "the vocabulary of this model has {} tokens; resize the embedding for new ones first",
                model.vocab_size
            );
            return Err(refuse(id.to_string(), &reason));
        }
        let place = match name {
            None => &mut embedding,
            Some(name) if layout.embed_tokens.ends_with(name) => &mut embedding,
            Some(name) if model.labels.is_none() && layout.lm_head.ends_with(name) => &mut head,
            Some(name) => {
                let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
                let mut nearest = vec![last(layout.embed_tokens)];
                nearest.extend(model.labels.is_none().then(|| last(layout.lm_head)));
                return Err(Error::Target { field: FIELD, value: name.into(), nearest });
            }
        };
        if place.replace(ids.to_vec()).is_some() {
            return Err(refuse(format!("{name:?}"), "another name there means the same module"));
        }
    }
    // A classifier has no head that could be tied.
    let mut tied = model.tie_word_embeddings && model.labels.is_none() && embedding.is_some();
    if let (true, Some(e), Some(h)) = (tied, &embedding, &head) {
        if e == h {
            head = None;
        } else if config.ensure_weight_tying {
            let reason =
                "embedding and head are tied, and ensure_weight_tying keeps them so: name the same tokens for both";
            return Err(refuse(format!("{e:?} and {h:?}"), reason));
        } else {
            tied = false;
        }
    }
    Ok(Some(TokenPlan { embedding, head, tied, dim: model.hidden_size }))
}

/// Whether the whole of a module that has trained rows is changed in another way, too.
pub(crate) fn check_alone(plan: &TokenPlan, model: &ModelConfig, has: impl Fn(&str) -> bool) -> Result<()> {
    let layout = model.layout;
    let roles = [(plan.embedding.is_some(), layout.embed_tokens), (plan.head.is_some() || plan.tied, layout.lm_head)];
    match roles.into_iter().find(|(is, path)| *is && has(path)) {
        None => Ok(()),
        Some((_, path)) => {
            let reason =
                format!("`{path}` has an adapter or is saved in full, which cannot be combined; keep one of them");
            Err(Error::Adapter { field: FIELD, value: path.into(), reason })
        }
    }
}

impl Decoder {
    /// Makes rows trainable, from what the base has there.
    pub(crate) fn inject_tokens(&mut self, plan: &TokenPlan) -> Result<()> {
        let start = |table: &Tensor, ids: &Option<Vec<i64>>| -> Result<Option<TokenRows>> {
            let Some(ids) = ids else { return Ok(None) };
            let rows = TokenRows::of_table(table, ids)?.f_set_requires_grad(true)?;
            Ok(Some(TokenRows::new(ids, rows, table.size()[0])?))
        };
        let embedding = start(&self.embed_tokens.weight, &plan.embedding)?;
        let head = match &embedding {
            Some(rows) if plan.tied => Some(rows.shared()),
            _ if plan.head.is_none() => None,
            _ => start(&self.language_head()?.weight.dense()?, &plan.head)?,
        };
        self.tokens = TokenAdapters { embedding, head };
        Ok(())
    }

    /// The rows of a folder, placed on this model's device; not yet in their places.
    ///
    /// # Errors
    /// As [`plan_tokens`], or [`Error::Module`] for rows that are missing or of another width.
    pub(crate) fn tokens_of(
        &self,
        folder: &AdapterFolder,
        place: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<TokenAdapters> {
        let Some(plan) = check_tokens(&self.config, folder)? else { return Ok(TokenAdapters::default()) };
        let (vocab, layout) = (self.config.vocab_size, self.config.layout);
        let rows_of = |path: &str, ids: &Option<Vec<i64>>| -> Result<Option<TokenRows>> {
            match (ids, folder.modules.get(path)) {
                (Some(ids), Some(AdapterModule::Tokens(rows))) => Ok(Some(TokenRows::new(ids, place(rows)?, vocab)?)),
                _ => Ok(None),
            }
        };
        let embedding = rows_of(layout.embed_tokens, &plan.embedding)?;
        let head = match &embedding {
            Some(rows) if plan.tied => Some(rows.shared()),
            _ => rows_of(layout.lm_head, &plan.head)?,
        };
        Ok(TokenAdapters { embedding, head })
    }

    /// The trained rows, a tied head's once.
    pub(crate) fn token_parameters(&self) -> Vec<Parameter> {
        let of = |(path, rows): (&str, &TokenRows)| {
            let name = format!("{path}.token_adapter.trainable_tokens_delta");
            rows.rows.requires_grad().then(|| Parameter { name, tensor: rows.rows.shallow_clone() })
        };
        self.token_roles().into_iter().filter_map(of).collect()
    }

    /// The rows as they are saved.
    pub(crate) fn token_modules(&self, list: &mut BTreeMap<String, AdapterModule>) {
        for (path, rows) in self.token_roles() {
            list.insert(path.into(), AdapterModule::Tokens(rows.rows.shallow_clone()));
        }
    }

    fn token_roles(&self) -> Vec<(&'static str, &TokenRows)> {
        let (layout, tokens) = (self.config.layout, &self.tokens);
        let head = tokens.head.as_ref().filter(|_| !tokens.is_shared());
        let roles = [(layout.embed_tokens, tokens.embedding.as_ref()), (layout.lm_head, head)];
        roles.into_iter().filter_map(|(path, rows)| Some((path, rows?))).collect()
    }

    /// The summed loss where the head has rows of its own: chunk by chunk, so that logits are never held whole; each
    /// row counts by its weight where there are weights. Gradients of
    /// hidden states and rows are computed on the way and handed to autograd as they are: the result is the loss, with
    /// `∂/∂hidden` and `∂/∂rows` for its derivatives.
    ///
    /// # Errors
    /// What an operation reports.
    pub(crate) fn loss_with_tokens(
        &self,
        hidden: &Tensor,
        targets: &Tensor,
        weights: Option<&Tensor>,
        rows: &TokenRows,
    ) -> Result<Tensor> {
        let wide = if hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let learns = hidden.requires_grad() || rows.rows.requires_grad();
        // A leaf says that it requires a gradient where none is recorded, too; what is made of it does not.
        let mut recorded = false;
        let leaf = |t: &Tensor| -> Result<Tensor> { Ok(t.f_detach()?.f_set_requires_grad(learns)?) };
        let (h, own) = (leaf(hidden)?, leaf(&rows.rows)?);
        let mut held = rows.shared();
        held.rows = own.shallow_clone();
        let mut sum = Tensor::f_zeros([0i64; 0], (wide, hidden.device()))?;
        let n = hidden.size()[0];
        let chunk = loss_chunk_rows(self.config.vocab_size, true);
        for first in (0..n).step_by(chunk as usize) {
            let count = chunk.min(n - first);
            let logits = self.logits_with(&h.f_narrow(0, first, count)?, Some(&held))?;
            let chosen = targets.f_narrow(0, first, count)?.f_unsqueeze(1)?;
            let mut losses = logits.f_log_softmax(-1, wide)?.f_gather(1, &chosen, false)?.f_neg()?;
            if let Some(weights) = weights {
                losses = losses.f_mul(&weights.f_narrow(0, first, count)?.f_unsqueeze(1)?)?;
            }
            let loss = losses.f_sum(wide)?;
            if loss.requires_grad() {
                recorded = true;
                backward(&[&loss], &[&loss.f_ones_like()?])?;
            }
            sum = sum.f_add(&loss.f_detach()?)?;
        }
        if !recorded {
            return Ok(sum);
        }
        for (through, copy) in [(hidden, &h), (&rows.rows, &own)].into_iter().filter(|(t, _)| t.requires_grad()) {
            // Zero, with the gradient that was computed.
            let zero = through.f_sub(&through.f_detach()?)?;
            sum = sum.f_add(&zero.f_mul(&copy.f_grad()?)?.f_sum(wide)?)?;
        }
        Ok(sum)
    }

    /// The token table with the trained rows in it, and the head; each in the dtype of the base.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn merged_tables(&self) -> Result<(Tensor, Tensor)> {
        let of = |table: &Tensor, rows: &Option<TokenRows>| match rows {
            Some(rows) => rows.merged(table),
            None => Ok(table.shallow_clone()),
        };
        let head = self.language_head()?.weight.dense()?;
        Ok((of(&self.embed_tokens.weight, &self.tokens.embedding)?, of(&head, &self.tokens.head)?))
    }
}

/// Whether the rows of a folder are there and fit the model: what the configuration means, if it means any.
///
/// # Errors
/// As [`plan_tokens`], or [`Error::Module`] for rows that are missing, left over or of another width.
pub(crate) fn check_tokens(model: &ModelConfig, folder: &AdapterFolder) -> Result<Option<TokenPlan>> {
    let plan = plan_tokens(model, &folder.config)?;
    let layout = model.layout;
    let fault = |module: &str, reason: String| Error::Module { module: module.into(), reason };
    let wanted = |path: &str| match &plan {
        Some(plan) if path == layout.embed_tokens => plan.embedding.as_ref(),
        // A tied head may be saved a second time.
        Some(plan) if path == layout.lm_head => plan.head.as_ref().or(plan.embedding.as_ref().filter(|_| plan.tied)),
        _ => None,
    };
    for (path, module) in &folder.modules {
        let AdapterModule::Tokens(rows) = module else { continue };
        let Some(ids) = wanted(path) else {
            return Err(fault(path, format!("has rows of tokens in the adapter, and is no module of {FIELD}")));
        };
        if rows.size() != [ids.len() as i64, model.hidden_size] {
            let reason =
                format!("has rows of {:?} in the adapter, and is {} wide here", rows.size(), model.hidden_size);
            return Err(fault(path, reason));
        }
    }
    let Some(found) = &plan else { return Ok(None) };
    for (ids, path) in [(&found.embedding, layout.embed_tokens), (&found.head, layout.lm_head)] {
        if ids.is_some() && !matches!(folder.modules.get(path), Some(AdapterModule::Tokens(_))) {
            return Err(fault(path, format!("has no rows in the adapter, though {FIELD} names it")));
        }
    }
    Ok(plan)
}
