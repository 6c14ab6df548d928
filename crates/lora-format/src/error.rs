//! What can be wrong with a file.

use std::path::PathBuf;
use tch::TchError;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of reading or writing a file; each names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `write`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A text file is not JSON.
    #[error("{}: not valid JSON: {source}; the line reads `{excerpt}`", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The faulty line, shortened.
        excerpt: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A file is larger than such a file can reasonably be.
    #[error("{}: {size} bytes, but at most {limit} are read for such a file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// The bytes allowed.
        limit: u64,
    },
    /// The header of a safetensors file is faulty.
    #[error("{}: damaged safetensors file: {fault}; fetch or save it again", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        fault: HeaderFault,
    },
    /// One tensor of a file is faulty, missing or unexpected.
    #[error("{}: tensor `{tensor}`: {fault}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong.
        #[source]
        fault: TensorFault,
    },
    /// A pickle file, which could run code when loaded.
    #[error(
        "{}: pickle files can run code and are never loaded; convert it in a trusted environment: load it with torch.load(.., weights_only=True) and write it with safetensors.torch.save_file, or save the model again with safe_serialization=True",
        path.display()
    )]
    Pickle {
        /// The file.
        path: PathBuf,
    },
    /// A folder holds no weights.
    #[error(
        "{}: holds no model.safetensors and no model.safetensors.index.json; give the folder of a Hugging Face checkpoint",
        path.display()
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// The index of a sharded checkpoint is faulty.
    #[error("{}: shard `{shard}`: {fault}", path.display())]
    Shard {
        /// The index file.
        path: PathBuf,
        /// The shard as the index names it.
        shard: String,
        /// What is wrong.
        #[source]
        fault: ShardFault,
    },
    /// A field of a config has a value that cannot be.
    #[error("{}: `{field}` is {value}, but must be {wanted}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value as written, shortened.
        value: String,
        /// What is allowed.
        wanted: String,
    },
    /// A config has keys that nobody here knows; ignoring them could change the mathematics silently.
    #[error(
        "{}: unknown keys {}; remove them if they have no effect, or use the version of the tool that wrote them",
        path.display(),
        keys.join(", ")
    )]
    UnknownKeys {
        /// The file.
        path: PathBuf,
        /// The keys, each with its value.
        keys: Vec<String>,
    },
    /// A config asks for something that exists but is not supported here.
    #[error("{}: `{field}` = {value} is not supported: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value as written, shortened.
        value: String,
        /// Why, and what to do instead.
        reason: &'static str,
    },
    /// A pattern over module names is no regular expression, or takes too long to match.
    #[error("pattern `{pattern}`: {source}; write it as a regular expression over module paths")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        #[source]
        source: Box<fancy_regex::Error>,
    },
    /// An adapter file without any tensor of an adapter.
    #[error("{}: holds no adapter tensors", path.display())]
    EmptyAdapter {
        /// The file.
        path: PathBuf,
    },
    /// libtorch refused an operation on the tensors of a file.
    #[error("{}: {source}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: lora_torch::Error,
    },
}

/// What is wrong with the header of a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderFault {
    /// Fewer bytes than the length of the header needs.
    #[error("{bytes} bytes are too few for a header")]
    TooShort {
        /// The bytes of the file.
        bytes: usize,
    },
    /// The header is longer than the format allows.
    #[error("a header of {bytes} bytes, where the format allows {limit}")]
    TooLong {
        /// The bytes it claims.
        bytes: u64,
        /// The bytes allowed.
        limit: u64,
    },
    /// The header ends after the file.
    #[error("a header of {bytes} bytes in a file of {file}: truncated")]
    PastEnd {
        /// The bytes it claims.
        bytes: u64,
        /// The bytes of the file.
        file: usize,
    },
    /// The header does not begin with `{`.
    #[error("the header does not begin with `{{`")]
    NotAnObject,
    /// The header is not the JSON that it should be.
    #[error("header: {source}")]
    Json {
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Bytes before, between or after the tensors belong to none.
    #[error("bytes {start}..{end} of the data belong to no tensor")]
    Hole {
        /// The first such byte.
        start: usize,
        /// One past the last.
        end: usize,
    },
}

/// What is wrong with a tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorFault {
    /// The file does not hold it.
    #[error("missing")]
    Missing,
    /// It does not belong there.
    #[error("unexpected: {why}")]
    Unexpected {
        /// Why.
        why: &'static str,
    },
    /// It has a name that another tool is known to write.
    #[error("unexpected: {why}; `lora repair` knows it as `{becomes}`")]
    Repairable {
        /// Why.
        why: &'static str,
        /// The name that it gets.
        becomes: String,
    },
    /// Its elements have a dtype that cannot be used.
    #[error("dtype {got}, but must be {wanted}")]
    Dtype {
        /// What it is.
        got: String,
        /// What it must be.
        wanted: &'static str,
    },
    /// Its shape is not the one wanted.
    #[error("shape {got:?}, but must be {wanted}")]
    Shape {
        /// What it is.
        got: Vec<i64>,
        /// What it must be.
        wanted: String,
    },
    /// The product of its sizes exceeds what a file can hold.
    #[error("shape {shape:?} overflows")]
    Overflow {
        /// The shape as written.
        shape: Vec<u64>,
    },
    /// Its bytes are not those of its shape and dtype.
    #[error("{got} bytes, where shape and dtype need {wanted}")]
    Size {
        /// The bytes it claims.
        got: usize,
        /// The bytes it needs.
        wanted: usize,
    },
    /// Its byte range is reversed or ends after the data.
    #[error("bytes {start}..{end} do not lie in the {data} bytes of data: damaged or truncated")]
    Range {
        /// The start.
        start: u64,
        /// The end.
        end: u64,
        /// The bytes of data in the file.
        data: usize,
    },
    /// Its byte range overlaps that of another tensor.
    #[error("overlaps tensor `{other}`")]
    Overlap {
        /// The other tensor.
        other: String,
    },
    /// It is part of a packed weight that cannot be read.
    #[error("cannot be unpacked: {why}")]
    Packed {
        /// Why.
        why: String,
    },
    /// Rows were asked for that it does not have.
    #[error("has shape {shape:?}, so there are no {count} rows from row {first} on")]
    Rows {
        /// The first row asked for.
        first: i64,
        /// How many.
        count: i64,
        /// Its shape.
        shape: Vec<i64>,
    },
    /// Some elements are NaN or infinite.
    #[error("{count} elements are not finite: the training that wrote it diverged")]
    NonFinite {
        /// How many.
        count: i64,
    },
    /// It was not handed over in the order that was announced.
    #[error("written where `{wanted}` was announced")]
    Order {
        /// The tensor that was due.
        wanted: String,
    },
}

/// What is wrong with a shard of an index.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardFault {
    /// The file is not there.
    #[error("not in the folder: the download is incomplete")]
    Missing,
    /// The name is a path, or otherwise no name of a safetensors file in the same folder.
    #[error("not a plain name of a .safetensors file")]
    Name,
    /// The index says that the shard holds a tensor that it does not.
    #[error("does not hold tensor `{tensor}`, which the index places there")]
    NoSuchTensor {
        /// The tensor.
        tensor: String,
    },
    /// Two shards hold the same tensor.
    #[error("holds tensor `{tensor}`, which `{other}` holds too")]
    Twice {
        /// The tensor.
        tensor: String,
        /// The other shard.
        other: String,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { action, path: path.into(), source }
    }

    pub(crate) fn header(path: impl Into<PathBuf>, fault: HeaderFault) -> Self {
        Error::Header { path: path.into(), fault }
    }

    pub(crate) fn tensor(path: impl Into<PathBuf>, tensor: impl Into<String>, fault: TensorFault) -> Self {
        Error::Tensor { path: path.into(), tensor: tensor.into(), fault }
    }

    pub(crate) fn tch(path: impl Into<PathBuf>, source: TchError) -> Self {
        Error::Torch { path: path.into(), source: source.into() }
    }
}
