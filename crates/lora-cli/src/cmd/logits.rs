//! `lora logits`: logits of given tokens, from file to file.

use crate::failure::usage;
use crate::load::{ModelArgs, Wanted};
use crate::out;
use crate::progress::CountBar;
use anyhow::Result;
use lora_format::{TensorFile, write_tensors};
use lora_model::{ClassTargets, Decoder, Mode, TokenBatch};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor, no_grad};

/// The flags of `lora logits`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// safetensors file with `input_ids` [batch, seq] and, if rows are padded, `attention_mask` (0 is padding); for an encoder
    /// also `token_type_ids`, if there are pairs of texts
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// safetensors file to write: `logits` [batch, seq, vocab] in float32, zero where the mask is; of a classifier
    /// [batch, labels]
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Runs the verb.
///
/// # Errors
/// What is wrong with model, adapter or input.
pub(crate) fn run(args: &Args) -> Result<()> {
    args.model.check()?;
    let input = Input::read(&args.input)?;
    let model = args.model.load(Wanted::Any)?.model;
    let mut bar = CountBar::new("rows");
    let logits = input.logits(&model, &mut |done, of| bar.set(done, of))?;
    bar.finish();
    let shape = logits.size();
    write_tensors(&args.output, &[("logits".to_string(), logits)], &BTreeMap::new())?;
    out::line(format!("{}: logits {:?} float32", args.output.display(), shape))
}

/// Token ids in rows of one length.
pub(crate) struct Input {
    seq: usize,
    /// For each row, the first token that is not padding, and the tokens up to the last such one.
    rows: Vec<(usize, Vec<i64>)>,
    /// For each row, the types of those tokens; empty where all are 0.
    types: Vec<Vec<i64>>,
}

impl Input {
    /// Rows without padding.
    pub(crate) fn from_rows(rows: Vec<Vec<i64>>) -> Self {
        let seq = rows.iter().map(Vec::len).max().unwrap_or(0);
        Self { seq, types: vec![Vec::new(); rows.len()], rows: rows.into_iter().map(|row| (0, row)).collect() }
    }

    fn read(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let (batch, seq, ids) = matrix(&file, "input_ids")?;
        let mask = match file.contains("attention_mask") {
            true => {
                let (b, s, mask) = matrix(&file, "attention_mask")?;
                if (b, s) != (batch, seq) {
                    let shown = path.display();
                    return Err(usage(format!(
                        "{shown}: `attention_mask` is [{b}, {s}] and `input_ids` [{batch}, {seq}]; they must be alike"
                    )));
                }
                mask
            }
            false => vec![1; ids.len()],
        };
        let rows = ids.chunks(seq).zip(mask.chunks(seq)).enumerate();
        let rows = rows.map(|(i, (ids, mask))| {
            let start = mask.iter().position(|m| *m != 0).unwrap_or(seq);
            let length = mask[start..].iter().take_while(|m| **m != 0).count();
            if mask[start + length..].iter().any(|m| *m != 0) {
                let shown = path.display();
                return Err(usage(format!(
                    "{shown}: row {i} of `attention_mask` has a hole; only padding on the left or right can be masked"
                )));
            }
            Ok((start, ids[start..start + length].to_vec()))
        });
        let rows: Vec<(usize, Vec<i64>)> = rows.collect::<Result<_>>()?;
        let types = match file.contains("token_type_ids") {
            true => {
                let (b, s, types) = matrix(&file, "token_type_ids")?;
                if (b, s) != (batch, seq) {
                    let shown = path.display();
                    return Err(usage(format!(
                        "{shown}: `token_type_ids` is [{b}, {s}] and `input_ids` [{batch}, {seq}]; they must be alike"
                    )));
                }
                let real =
                    types.chunks(seq).zip(&rows).map(|(row, (start, ids))| row[*start..start + ids.len()].to_vec());
                real.collect()
            }
            false => vec![Vec::new(); rows.len()],
        };
        Ok(Self { seq, rows, types })
    }

    /// `[batch, seq, vocab]`, of a classifier `[batch, labels]`, float32 on the CPU, a row at a time.
    ///
    /// # Errors
    /// An id outside the vocabulary, or what the model reports.
    pub(crate) fn logits(&self, model: &Decoder, progress: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        let torch = lora_torch::Error::from;
        if model.config.labels.is_some() {
            return self.class_logits(model, progress);
        }
        let shape = [self.rows.len() as i64, self.seq as i64, model.config.vocab_size];
        let all = Tensor::f_zeros(shape, (Kind::Float, Device::Cpu)).map_err(torch)?;
        let longest = self.rows.iter().map(|(_, ids)| ids.len() as i64).max().unwrap_or(0);
        for (i, (start, ids)) in self.rows.iter().enumerate().filter(|(_, (_, ids))| !ids.is_empty()) {
            let batch = TokenBatch::new(&model.config, ids, &[ids.len() as i64], &[], &[], model.device())?;
            let batch = batch.beside(longest);
            let logits = no_grad(|| model.logits(&model.hidden(&batch, Mode::Eval, None)?))?;
            let place = all.f_select(0, i as i64).and_then(|row| row.f_narrow(0, *start as i64, ids.len() as i64));
            place.and_then(|mut place| place.f_copy_(&logits)).map_err(torch)?;
            progress(i + 1, self.rows.len());
        }
        Ok(all)
    }

    fn class_logits(&self, model: &Decoder, progress: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        let mut all = Vec::with_capacity(self.rows.len());
        for (i, ((_, ids), types)) in self.rows.iter().zip(&self.types).enumerate() {
            if ids.is_empty() {
                return Err(usage(format!("row {i} of `input_ids` has no token that is not padding")));
            }
            let (lens, none) = ([ids.len() as i64], ClassTargets::Unknown);
            let batch = TokenBatch::for_classes(&model.config, ids, types, &lens, none, model.device())?;
            all.push(no_grad(|| model.class_logits(&batch, Mode::Eval))?);
            progress(i + 1, self.rows.len());
        }
        let all = Tensor::f_cat(&all, 0).and_then(|t| t.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu));
        Ok(all.map_err(lora_torch::Error::from)?)
    }
}

/// A tensor of whole numbers with two dimensions, row by row.
pub(crate) fn matrix(file: &TensorFile, name: &str) -> Result<(usize, usize, Vec<i64>)> {
    let shown = file.path().display();
    let info = file.info(name)?;
    let whole = [Kind::Int64, Kind::Int, Kind::Int16, Kind::Int8, Kind::Uint8, Kind::Bool].contains(&info.kind);
    let &[batch, seq] = info.shape.as_slice() else {
        return Err(usage(format!("{shown}: `{name}` must be [batch, seq], found {:?}", info.shape)));
    };
    if !whole || batch < 1 || seq < 1 {
        let found = lora_torch::kind_name(info.kind);
        return Err(usage(format!(
            "{shown}: `{name}` must be whole numbers, at least one, found {found} {:?}",
            info.shape
        )));
    }
    let flat =
        file.read(name)?.f_to_kind(Kind::Int64).and_then(|t| t.f_reshape([-1])).map_err(lora_torch::Error::from)?;
    let ids = Vec::<i64>::try_from(&flat).map_err(lora_torch::Error::from)?;
    Ok((batch as usize, seq as usize, ids))
}
