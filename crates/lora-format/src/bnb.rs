//! Weights as bitsandbytes saves them: 4-bit NormalFloat codes, or 8-bit integers, under the name of the weight, and what
//! undoes them beside.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, TensorFault};
use crate::fields::Fields;
use lora_torch::{Int8, Nf4, Scales, Weight, kind_bytes, kind_name};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// What stands after the name of a weight for the settings of its codes.
const STATE: &str = ".quant_state.bitsandbytes__nf4";
/// The same of the older 4-bit type.
const STATE_FP4: &str = ".quant_state.bitsandbytes__fp4";
/// What else stands after the name of a weight of 4 bits.
const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];
/// What stands after the name of a module whose weight is of 8 bits: the largest magnitude of each row, and how the rows lie.
const SCALES: &str = ".SCB";
const LAYOUT: &str = ".weight_format";

/// A packed weight, by what the headers and its settings say; none of its codes has been read.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedWeight {
    /// `[out, in]` of the weight that the codes stand for.
    pub shape: [i64; 2],
    /// The dtype that it was packed from, where the file says.
    pub packed_from: Option<Kind>,
    /// Bytes that it takes in memory: its codes, and what undoes them.
    pub bytes: i64,
    form: Form,
}

#[derive(Clone, Debug, PartialEq)]
enum Form {
    Nf4 { block: i64, nested: Option<Nested> },
    Int8,
}

#[derive(Clone, Debug, PartialEq)]
struct Nested {
    block: i64,
    offset: f64,
}

impl PackedWeight {
    /// `nf4`, `nf4-double` or `int8`.
    pub fn name(&self) -> &'static str {
        match self.form {
            Form::Nf4 { nested: None, .. } => "nf4",
            Form::Nf4 { nested: Some(_), .. } => "nf4-double",
            Form::Int8 => "int8",
        }
    }
}

/// Whether a weight is in packed form, or has what only one in packed form has.
pub fn is_packed(checkpoint: &Checkpoint, name: &str) -> bool {
    let Some(module) = name.strip_suffix(".weight") else { return false };
    let beside = [STATE, STATE_FP4].into_iter().chain(PARTS).any(|part| checkpoint.holds(&format!("{name}{part}")));
    let codes = || checkpoint.stored_info(name).is_ok_and(|info| [Kind::Uint8, Kind::Int8].contains(&info.kind));
    beside || checkpoint.holds(&format!("{module}{SCALES}")) || codes()
}

/// Whether a tensor belongs to the packed form of another one.
pub fn is_part(name: &str) -> bool {
    let four = [STATE, STATE_FP4].into_iter().chain(PARTS);
    let of_weight = |end: &str| name.strip_suffix(end).is_some_and(|weight| weight.ends_with(".weight"));
    four.into_iter().any(of_weight) || name.ends_with(SCALES) || name.ends_with(LAYOUT)
}

/// What the files say of a packed weight; every part of it is checked against its settings.
///
/// # Errors
/// [`Error::Tensor`] for a part that is missing or does not fit, for another 4-bit type, or for settings that cannot be read.
pub fn packed_weight(checkpoint: &Checkpoint, name: &str) -> Result<PackedWeight> {
    let parts = Parts::of(checkpoint, name)?;
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let codes = checkpoint.stored_info(name)?;
    if checkpoint.holds(&format!("{module}{SCALES}")) || codes.kind == Kind::Int8 {
        return parts.int8(module);
    }
    if checkpoint.holds(&format!("{name}{STATE_FP4}")) {
        let why = "FP4 codes are not read; pack the model with quant_type \"nf4\", or give the unpacked checkpoint";
        return Err(parts.fault(STATE_FP4, why.into()));
    }
    parts.nf4()
}

/// Reads a packed weight, its codes as they are.
///
/// # Errors
/// As [`packed_weight`]; [`Error::Tensor`] for a code table that is not that of NormalFloat.
pub fn read_packed(checkpoint: &Checkpoint, name: &str) -> Result<Weight> {
    let info = checkpoint.stored_info(name)?;
    // Codes of 4 bits are bytes, whatever dtype they are stored as (`bnb_4bit_quant_storage`).
    let bytes = checkpoint.bytes(name)?;
    let read = match info.kind {
        Kind::Int8 => lora_torch::tensor_from_bytes(bytes, &info.shape, Kind::Int8),
        _ => lora_torch::tensor_from_bytes(bytes, &[bytes.len() as i64], Kind::Uint8),
    };
    let path = checkpoint.shard_of(name)?.path();
    with_codes(checkpoint, name, read.map_err(|source| Error::Torch { path: path.into(), source })?)
}

/// The same over the mapped file, for who needs some rows only.
pub(crate) fn view_packed(checkpoint: &Checkpoint, name: &str) -> Result<Weight> {
    match checkpoint.stored_info(name)?.kind {
        Kind::Uint8 | Kind::Int8 => with_codes(checkpoint, name, checkpoint.view(name)?),
        _ => read_packed(checkpoint, name),
    }
}

fn with_codes(checkpoint: &Checkpoint, name: &str, codes: Tensor) -> Result<Weight> {
    let PackedWeight { shape, form, .. } = packed_weight(checkpoint, name)?;
    let parts = Parts::of(checkpoint, name)?;
    let part = |suffix: &str| checkpoint.stored(&format!("{name}{suffix}"));
    let (block, nested) = match form {
        Form::Nf4 { block, nested } => (block, nested),
        Form::Int8 => {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let scales = checkpoint.stored(&format!("{module}{SCALES}"))?;
            let scales = scales.f_reshape([-1]).map_err(|e| parts.torch(e))?;
            return Ok(Weight::Int8(Int8 { codes, scales }));
        }
    };
    check_table(&part(".quant_map")?).map_err(|why| parts.fault(".quant_map", why))?;
    let absmax = part(".absmax")?;
    let scales = match nested {
        None => Scales::Plain(absmax),
        Some(Nested { block, offset }) => Scales::Nested {
            codes: absmax,
            absmax: part(".nested_absmax")?,
            table: part(".nested_quant_map")?,
            offset,
            block,
        },
    };
    Ok(Weight::Nf4(Nf4::from_parts(codes, scales, block, shape).map_err(|e| parts.fault("", e.to_string()))?))
}

/// The parts of one packed weight in the files.
struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    path: PathBuf,
}

impl<'a> Parts<'a> {
    fn of(checkpoint: &'a Checkpoint, name: &'a str) -> Result<Self> {
        Ok(Self { checkpoint, name, path: checkpoint.shard_of(name)?.path().to_path_buf() })
    }

    fn fault(&self, part: &str, why: String) -> Error {
        Error::tensor(&self.path, format!("{}{part}", self.name), TensorFault::Packed { why })
    }

    fn torch(&self, e: tch::TchError) -> Error {
        Error::Torch { path: self.path.clone(), source: e.into() }
    }

    /// Checks that a part is there with so many numbers, and returns its bytes.
    fn check(&self, part: &str, kind: Kind, wanted: i64) -> Result<i64> {
        let full = format!("{}{part}", self.name);
        self.check_named(&full, kind, wanted)
    }

    fn check_named(&self, full: &str, kind: Kind, wanted: i64) -> Result<i64> {
        let fault = |why: String| Error::tensor(&self.path, full, TensorFault::Packed { why });
        if !self.checkpoint.holds(full) {
            let why = "it is missing, without which the codes mean nothing; take the files from where the model is from again";
            return Err(fault(why.into()));
        }
        let info = self.checkpoint.stored_info(full)?;
        let got: i64 = info.shape.iter().product();
        if info.kind != kind || got != wanted {
            let (of, own) = (kind_name(kind), kind_name(info.kind));
            return Err(fault(format!("it is {:?} of {own}, and {wanted} of {of} are needed", info.shape)));
        }
        Ok(got * kind_bytes(kind) as i64)
    }

    fn int8(&self, module: &str) -> Result<PackedWeight> {
        let codes = self.checkpoint.stored_info(self.name)?;
        let (&[rows, cols], Kind::Int8) = (codes.shape.as_slice(), codes.kind) else {
            let own = kind_name(codes.kind);
            return Err(self.fault("", format!("it is {:?} of {own} and not a matrix of int8", codes.shape)));
        };
        let scales = self.check_named(&format!("{module}{SCALES}"), Kind::Float, rows)?;
        let layout = format!("{module}{LAYOUT}");
        if self.checkpoint.holds(&layout) {
            let stored = self.checkpoint.stored(&layout)?;
            let number = stored.f_reshape([-1]).and_then(|t| t.f_int64_value(&[0])).map_err(|e| self.torch(e))?;
            if number != 0 {
                let why = format!("the rows lie as number {number} says, and only 0, one after the other, is read");
                return Err(Error::tensor(&self.path, layout, TensorFault::Packed { why }));
            }
        }
        Ok(PackedWeight { shape: [rows, cols], packed_from: None, bytes: rows * cols + scales, form: Form::Int8 })
    }

    fn nf4(&self) -> Result<PackedWeight> {
        let state_name = format!("{}{STATE}", self.name);
        if !self.checkpoint.holds(&state_name) {
            self.check(STATE, Kind::Uint8, 1)?;
        }
        let state = settings(&self.path, self.name, &self.checkpoint.stored(&state_name)?)?;
        let prefix = format!("{state_name}.");
        let fields = Fields::new(&self.path, &prefix, &state);
        let kind = fields.string("quant_type")?;
        if kind.as_deref() != Some("nf4") {
            return Err(self.fault(STATE, format!("quant_type is {kind:?} and not \"nf4\"")));
        }
        let shape = fields.ints("shape", 1, i64::from(i32::MAX))?.unwrap_or_default();
        let &[rows, cols] = shape.as_slice() else {
            return Err(self.fault(STATE, format!("shape {shape:?} is not that of a matrix")));
        };
        let whole = |key: &str| fields.int(key, 1, i64::from(i32::MAX));
        let block = whole("blocksize")?.unwrap_or(lora_torch::NF4_BLOCK);
        // Both sides are below 2^31.
        let numbers = rows * cols;
        let (pairs, blocks) = (numbers / 2 + numbers % 2, (numbers + block - 1) / block);
        let codes = self.checkpoint.bytes(self.name)?.len() as i64;
        if codes != pairs {
            return Err(
                self.fault("", format!("it has {codes} bytes of codes, and {rows} x {cols} numbers take {pairs}"))
            );
        }
        self.check(".quant_map", Kind::Float, 16)?;
        let nested = match whole("nested_blocksize")? {
            None => None,
            Some(block) => Some(Nested { block, offset: fields.float("nested_offset")?.unwrap_or(0.0) }),
        };
        let scales = match &nested {
            None => self.check(".absmax", Kind::Float, blocks)?,
            Some(Nested { block, .. }) => {
                self.check(".absmax", Kind::Uint8, blocks)?
                    + self.check(".nested_absmax", Kind::Float, (blocks + block - 1) / block)?
                    + self.check(".nested_quant_map", Kind::Float, 256)?
            }
        };
        let packed_from = fields.string("dtype")?.as_deref().and_then(lora_torch::parse_kind);
        Ok(PackedWeight { shape: [rows, cols], packed_from, bytes: pairs + scales, form: Form::Nf4 { block, nested } })
    }
}

/// The tensors under which a packed weight is saved, and what `quantization_config` of `config.json` says of such a model is
/// [`quantization_config`].
///
/// # Errors
/// What libtorch reports.
pub fn nf4_tensors(name: &str, weight: &Nf4) -> Result<Vec<(String, Tensor)>> {
    let torch = |source| Error::Torch { path: name.into(), source };
    let tch = |e| torch(lora_torch::Error::from(e));
    let mut state = Map::new();
    state.insert("quant_type".into(), json!("nf4"));
    state.insert("blocksize".into(), json!(weight.block));
    state.insert("dtype".into(), json!("float32"));
    state.insert("shape".into(), json!(weight.shape()));
    let mut list = vec![
        (name.to_string(), weight.codes.f_unsqueeze(1).map_err(tch)?),
        (format!("{name}.quant_map"), Nf4::table().map_err(torch)?),
    ];
    match &weight.scales {
        Scales::Plain(absmax) => list.push((format!("{name}.absmax"), absmax.shallow_clone())),
        Scales::Nested { codes, absmax, table, offset, block } => {
            list.push((format!("{name}.absmax"), codes.shallow_clone()));
            list.push((format!("{name}.nested_absmax"), absmax.shallow_clone()));
            list.push((format!("{name}.nested_quant_map"), table.shallow_clone()));
            state.insert("nested_blocksize".into(), json!(block));
            state.insert("nested_dtype".into(), json!("float32"));
            state.insert("nested_offset".into(), json!(offset));
        }
    }
    let text = Value::Object(state).to_string();
    list.push((format!("{name}{STATE}"), Tensor::f_from_slice(text.as_bytes()).map_err(tch)?));
    Ok(list)
}

/// What `config.json` says of a model packed so, for transformers.
pub fn quantization_config(double: bool, skipped: &[&str]) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}

/// The settings, JSON in a tensor of bytes.
fn settings(path: &Path, name: &str, bytes: &Tensor) -> Result<Map<String, Value>> {
    let fault = |why: String| Error::tensor(path, format!("{name}{STATE}"), TensorFault::Packed { why });
    if bytes.kind() != Kind::Uint8 {
        return Err(fault("it is not a text in bytes".into()));
    }
    let bytes = lora_torch::tensor_bytes(bytes).map_err(|source| Error::Torch { path: path.into(), source })?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(fault("it is not a JSON object".into())),
        Err(e) => Err(fault(format!("it is not JSON: {e}"))),
    }
}

/// Codes mean nothing under another table.
fn check_table(table: &Tensor) -> std::result::Result<(), String> {
    let ours = Nf4::table().map_err(|e| e.to_string())?;
    let same = table.kind() == Kind::Float && table.size() == ours.size() && table.equal(&ours);
    if same { Ok(()) } else { Err("it is not the table of 4-bit NormalFloat".into()) }
}
