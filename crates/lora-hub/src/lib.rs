//! Models and datasets of the Hugging Face hub by name: what the cache lacks is fetched, checked and kept.
//!
//! The cache is that of `huggingface_hub`, in its own layout, so that each finds what the other fetched:
//! `models--owner--name/refs/REVISION` names a commit, `snapshots/COMMIT/path` links to `blobs/ETAG`. What is there is used
//! without asking anyone. What is fetched is compared with the hub's own digest before it gets its name; a download that was
//! cut goes on where it stopped.
//!
//! [`fetch`] is the whole of it. The crate reads no environment: [`Settings`] say where the hub and the cache are.

mod cache;
mod client;
mod digest;
mod download;
mod error;
mod fetch;
mod listing;
mod redirect;
mod repo;
mod settings;
mod wanted;

pub use error::{HubError, Result};
pub use fetch::{Event, Fetched, Freshness, fetch};
pub use repo::{Repo, RepoKind};
pub use settings::{Settings, Token};
pub use ureq::Proxy;
pub use wanted::model_files;
