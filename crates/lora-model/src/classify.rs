//! Classification: the head, the batch, the loss. One hidden state stands for a text: of an encoder that of its first
//! token, of a decoder that of its last.

use crate::batch::TokenBatch;
use crate::config::ModelConfig;
use crate::decoder::{Decoder, Mode};
use crate::error::{Error, Result};
use lora_core::LinearLayer;
use lora_format::ProblemType;
use tch::{Device, Kind, Reduction, Tensor};

/// What reads the hidden states.
#[derive(Debug)]
pub enum Head {
    /// `[vocab, hidden]`; shares the token table's weight when tied.
    Language(LinearLayer),
    /// Scores labels.
    Classes(ClassHead),
    /// Another stage has it.
    Elsewhere,
}

/// Weights of a classification head: `out(tanh(dense(x)))`, or `out(x)`.
#[derive(Debug)]
pub struct ClassHead {
    /// `[hidden, hidden]`, in encoders.
    pub dense: Option<LinearLayer>,
    /// `[labels, hidden]`
    pub out: LinearLayer,
}

impl ClassHead {
    /// `[texts, hidden]` to `[texts, labels]`.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        // What is trained in full is fp32 over a base of any dtype.
        let apply = |layer: &LinearLayer, x: &Tensor| -> Result<Tensor> {
            let kind = layer.weight.plain().map_or_else(|| x.kind(), Tensor::kind);
            Ok(layer.forward(&x.f_to_kind(kind)?, 0.0)?)
        };
        let x = match &self.dense {
            Some(dense) => apply(dense, hidden)?.f_tanh()?,
            None => hidden.shallow_clone(),
        };
        apply(&self.out, &x)
    }
}

/// What is to be predicted of the texts of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ClassTargets<'a> {
    /// Nothing is known.
    Unknown,
    /// The label of each text.
    Ids(&'a [i64]),
    /// For each text a number for each label: whether it applies (0 or 1), or what it is.
    Values(&'a [f32]),
}

impl TokenBatch {
    /// A batch for a classifier: texts end to end, and the type of each token (empty where all are 0).
    ///
    /// # Errors
    /// [`Error::Input`] as [`TokenBatch::new`], for a type that the model has not, and for targets that are not as many
    /// as the texts or of another kind than the model's problem; [`Error::NoClasses`] for a language model.
    pub fn for_classes(
        config: &ModelConfig,
        input_ids: &[i64],
        token_types: &[i64],
        segment_lens: &[i64],
        targets: ClassTargets<'_>,
        device: Device,
    ) -> Result<Self> {
        let Some(labels) = &config.labels else { return Err(Error::NoClasses { family: config.family.clone() }) };
        let outside = |what, expected: String, got: String| Err(Error::Input { what, expected, got });
        let mut batch = Self::new(config, input_ids, segment_lens, &[], &[], device)?;
        let place = |t: Tensor| -> Result<Tensor> { Ok(t.f_to_device(device)?) };
        if config.layout.embed_types.is_some() && !token_types.is_empty() {
            if token_types.len() != input_ids.len() {
                return outside("token types", format!("{} types", input_ids.len()), token_types.len().to_string());
            }
            if let Some(t) = token_types.iter().find(|t| !(0..config.type_vocab_size).contains(*t)) {
                return outside("token type", format!("in [0, {})", config.type_vocab_size), t.to_string());
            }
            batch.token_types = Some(place(Tensor::f_from_slice(token_types)?)?);
        }
        let mut end = 0;
        let rows = segment_lens.iter().map(|n| {
            end += n;
            if config.layout.encoder { end - n } else { end - 1 }
        });
        batch.target_rows = place(Tensor::f_from_slice(&rows.collect::<Vec<i64>>())?)?;
        let (texts, count) = (segment_lens.len(), labels.len());
        batch.targets = place(match (targets, labels.problem) {
            (ClassTargets::Unknown, _) => Tensor::f_zeros([0], (Kind::Int64, Device::Cpu))?,
            (ClassTargets::Ids(ids), ProblemType::SingleLabel) if ids.len() == texts => {
                if let Some(id) = ids.iter().find(|id| !(0..count as i64).contains(*id)) {
                    return outside("label", format!("in [0, {count})"), id.to_string());
                }
                Tensor::f_from_slice(ids)?
            }
            (ClassTargets::Values(values), ProblemType::MultiLabel | ProblemType::Regression)
                if values.len() == texts * count =>
            {
                Tensor::f_from_slice(values)?.f_view([texts as i64, count as i64])?
            }
            (targets, problem) => {
                let wanted = match problem {
                    ProblemType::SingleLabel => format!("{texts} ids"),
                    _ => format!("{} values", texts * count),
                };
                let got = match targets {
                    ClassTargets::Unknown => "none".to_string(),
                    ClassTargets::Ids(ids) => format!("{} ids", ids.len()),
                    ClassTargets::Values(values) => format!("{} values", values.len()),
                };
                return outside("targets", wanted, got);
            }
        })?;
        Ok(batch)
    }
}

impl Decoder {
    /// The scores of the labels of each text of a batch.
    ///
    /// # Shapes
    /// `[texts, labels]`, in the dtype of the head.
    ///
    /// # Errors
    /// [`Error::NoClasses`] for a language model, or what an operation reports.
    pub fn class_logits(&self, batch: &TokenBatch, mode: Mode) -> Result<Tensor> {
        let Head::Classes(head) = &self.head else {
            return Err(Error::NoClasses { family: self.config.family.clone() });
        };
        head.forward(&self.hidden(batch, mode, Some(&batch.target_rows))?)
    }

    /// The sum over the texts of a batch of the loss of each, as transformers takes it: cross entropy; or binary cross
    /// entropy or the squared error, both the mean over the labels. fp32 (fp64 for fp64 logits).
    ///
    /// # Shapes
    /// `logits` `[texts, labels]` of the batch; the result is a scalar.
    ///
    /// # Errors
    /// [`Error::Input`] for a batch without targets, [`Error::NoClasses`] for a language model.
    pub fn class_loss(&self, logits: &Tensor, batch: &TokenBatch) -> Result<Tensor> {
        let Some(labels) = &self.config.labels else {
            return Err(Error::NoClasses { family: self.config.family.clone() });
        };
        let (texts, targets) = (logits.size()[0], &batch.targets);
        if targets.size().first() != Some(&texts) {
            let got = targets.size().first().copied().unwrap_or(0).to_string();
            return Err(Error::Input { what: "targets", expected: format!("one for each of {texts} texts"), got });
        }
        let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let logits = logits.f_to_kind(wide)?;
        let sum = match labels.problem {
            ProblemType::SingleLabel => {
                let chosen = logits.f_log_softmax(-1, wide)?.f_gather(1, &targets.f_unsqueeze(1)?, false)?;
                return Ok(chosen.f_sum(wide)?.f_neg()?);
            }
            ProblemType::MultiLabel => logits.f_binary_cross_entropy_with_logits::<Tensor>(
                &targets.f_to_kind(wide)?,
                None,
                None,
                Reduction::Sum,
            )?,
            ProblemType::Regression => logits.f_mse_loss(&targets.f_to_kind(wide)?, Reduction::Sum)?,
        };
        Ok(sum.f_div_scalar(labels.len() as f64)?)
    }
}
