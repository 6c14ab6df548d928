//! Runs as pages and as TensorBoard event files; links no torch.
//!
//! [`Run::read`] takes a run's folder apart, [`page()`] makes one page of one run or of several, [`EventWriter`] writes what
//! TensorBoard reads. The page asks for nothing from anywhere; what files say is text in it and nothing else.
//!
//! ```no_run
//! use lora_report::{Run, page};
//!
//! let runs = [Run::read("runs/first".as_ref())?, Run::read("runs/second".as_ref())?];
//! std::fs::write("both.html", page(&runs)?).ok();
//! # Ok::<(), lora_report::Error>(())
//! ```

mod about;
mod chart;
mod curves;
mod digest;
mod error;
mod escape;
mod many;
mod numbers;
mod one;
mod page;
mod parts;
mod run;
mod tensorboard;

pub use about::{About, AboutData, RUN_FILE, Status};
pub use error::{Error, Result};
pub use page::{REPORT_FILE, page};
pub use run::{Run, SAMPLES_FILE, Sample, Series};
pub use tensorboard::{EventWriter, Record, ScalarEvent, masked_crc32c, read_records, read_scalars};
