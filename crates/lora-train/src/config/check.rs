//! Every key of a tree against the table of keys. What is wrong is reported and taken out of the tree, so that the rest can
//! still be read and checked.

use super::faults::{Fault, FaultKind};
use super::keys::{Key, Kind};
use super::source::Places;
use super::{SECTIONS, TOP_KEYS, unknown};
use toml::{Table, Value};

pub(crate) fn check(tree: &mut Table, places: &Places) -> Vec<Fault> {
    let mut faults = Vec::new();
    tree.retain(|name, value| match (SECTIONS.iter().find(|(section, _)| *section == name), value) {
        (Some((section, keys)), Value::Table(table)) => {
            check_table(&format!("{section}."), keys, table, places, &mut faults);
            true
        }
        (Some((section, _)), other) => {
            let kind = FaultKind::NotAllowed { allowed: format!("a section: [{section}]") };
            faults.push(places.fault(name, Some(other), kind));
            false
        }
        (None, value) => check_entry("", TOP_KEYS, name, value, places, &mut faults),
    });
    faults
}

fn check_table(prefix: &str, keys: &'static [Key], table: &mut Table, places: &Places, faults: &mut Vec<Fault>) {
    table.retain(|name, value| check_entry(prefix, keys, name, value, places, faults));
}

/// Whether the entry is to stay.
fn check_entry(
    prefix: &str,
    keys: &'static [Key],
    name: &str,
    value: &mut Value,
    places: &Places,
    faults: &mut Vec<Fault>,
) -> bool {
    let path = format!("{prefix}{name}");
    let Some(Key { kind, .. }) = keys.iter().find(|key| key.name == name) else {
        if let Some(kind) = unknown::unknown(prefix, keys, name, value) {
            faults.push(places.fault(&path, Some(value), kind));
        }
        return false;
    };
    kind.normalise(value);
    if !kind.accepts(value) {
        faults.push(places.fault(&path, Some(value), FaultKind::NotAllowed { allowed: kind.allowed() }));
        return false;
    }
    if let (Kind::Tables(keys), Some(list)) = (kind, value.as_array_mut()) {
        for (i, entry) in list.iter_mut().enumerate() {
            if let Value::Table(table) = entry {
                check_table(&format!("{path}[{i}]."), keys, table, places, faults);
            }
        }
    }
    true
}
