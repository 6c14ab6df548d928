//! Named tensors of which each process has some: brought to rank 0, and from there to whoever wants them.

use crate::error::{Error, Result};
use crate::team::Team;
use lora_torch::{kind_name, named_kind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

/// Tensors by name.
pub(crate) type Named = Vec<(String, Tensor)>;

/// A tensor that one process has or wants.
#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    kind: String,
    shape: Vec<i64>,
}

/// What each process has or wants, in the order of ranks.
fn lists(team: &Team, own: &Named) -> Result<Vec<Vec<Entry>>> {
    let json = |source| Error::Json { what: "a list of tensors", source };
    let entry =
        |(name, t): &(String, Tensor)| Entry { name: name.clone(), kind: kind_name(t.kind()).into(), shape: t.size() };
    let text = serde_json::to_vec(&own.iter().map(entry).collect::<Vec<_>>()).map_err(json)?;
    let all = team.collective().gather(&text)?;
    all.iter().map(|text| serde_json::from_slice(text)).collect::<serde_json::Result<_>>().map_err(json)
}

/// Takes a tensor of another process.
fn take(team: &Team, entry: &Entry, from: u32) -> Result<Tensor> {
    let mismatch = || Error::StateMismatch {
        name: entry.name.clone(),
        expected: "of a known dtype".into(),
        found: entry.kind.clone(),
    };
    let kind = named_kind(&entry.kind).ok_or_else(mismatch)?;
    let transfer = team.collective().receive(&entry.shape, kind, from)?;
    Ok(team.collective().arrive(transfer)?)
}

/// Gives a tensor to another process, which takes it at the same time.
fn give(team: &Team, tensor: &Tensor, to: u32) -> Result<()> {
    let sent = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let transfer = team.collective().send(&sent, to)?;
    let _sent = team.collective().arrive(transfer)?;
    Ok(())
}

/// The tensors of all processes at rank 0, its own first; none elsewhere. Every process calls it.
pub(crate) fn gather(team: &Team, own: Named) -> Result<Named> {
    let lists = lists(team, &own)?;
    if !team.leads() {
        own.iter().try_for_each(|(_, tensor)| give(team, tensor, 0))?;
        return Ok(Vec::new());
    }
    let mut all = own;
    for (rank, list) in (0..).zip(&lists).skip(1) {
        for entry in list {
            all.push((entry.name.clone(), take(team, entry, rank)?));
        }
    }
    Ok(all)
}

/// Gives each process those of rank 0's tensors that it `wants`; all hear of one that is missing, of another shape or dtype, or that
/// nobody wants. Every process calls it.
pub(crate) fn spread(team: &Team, wants: &Named, has: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    let lists = lists(team, wants)?;
    team.agree(if team.leads() { check(&lists, &has) } else { Ok(()) })?;
    let mut own = BTreeMap::new();
    if !team.leads() {
        for entry in lists.into_iter().nth(team.rank() as usize).unwrap_or_default() {
            let tensor = take(team, &entry, 0)?;
            own.insert(entry.name, tensor);
        }
        return Ok(own);
    }
    for (rank, list) in (0..).zip(&lists) {
        for entry in list {
            let Some(tensor) = has.get(&entry.name) else { continue };
            match rank {
                0 => drop(own.insert(entry.name.clone(), tensor.shallow_clone())),
                rank => give(team, tensor, rank)?,
            }
        }
    }
    Ok(own)
}

fn check(lists: &[Vec<Entry>], has: &BTreeMap<String, Tensor>) -> Result<()> {
    let mut unwanted: Vec<&String> = has.keys().collect();
    for entry in lists.iter().flatten() {
        unwanted.retain(|name| **name != entry.name);
        let found = has.get(&entry.name).map(|t| format!("{} {:?}", kind_name(t.kind()), t.size()));
        let expected = format!("{} {:?}", entry.kind, entry.shape);
        if found.as_ref() != Some(&expected) {
            let found = found.unwrap_or_else(|| "nothing".into());
            return Err(Error::StateMismatch { name: entry.name.clone(), expected, found });
        }
    }
    match unwanted.first() {
        Some(name) => {
            let (expected, found) = ("nothing".into(), "a tensor".into());
            Err(Error::StateMismatch { name: (*name).clone(), expected, found })
        }
        None => Ok(()),
    }
}
