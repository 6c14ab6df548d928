//! What a launcher says of a process: its place, and where the others meet.

use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

/// A process's place among those that were started together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Its place, from 0.
    pub rank: u32,
    /// How many there are.
    pub world: u32,
    /// Its place among those of its machine.
    pub local_rank: u32,
    /// The machine of rank 0.
    pub address: String,
    /// The port of the store there.
    pub port: u16,
    /// Whether rank 0 holds the store; otherwise the launcher does.
    pub hosts: bool,
    /// How often the launcher has started them again.
    pub attempt: u32,
}

/// The names by which a launcher tells rank, number and local rank.
struct Family {
    rank: &'static str,
    world: &'static str,
    local_rank: &'static str,
}

/// torchrun's names, which `lora launch` and Kubeflow use, too.
const TORCHRUN: Family = Family { rank: "RANK", world: "WORLD_SIZE", local_rank: "LOCAL_RANK" };
const OTHERS: [Family; 2] = [
    Family { rank: "SLURM_PROCID", world: "SLURM_NTASKS", local_rank: "SLURM_LOCALID" },
    Family { rank: "OMPI_COMM_WORLD_RANK", world: "OMPI_COMM_WORLD_SIZE", local_rank: "OMPI_COMM_WORLD_LOCAL_RANK" },
];
const ADDRESS: &str = "MASTER_ADDR";
const PORT: &str = "MASTER_PORT";

impl Launch {
    /// Reads torchrun's variables; where none of them is set, those of SLURM's `srun` or of Open MPI, if `MASTER_ADDR` and
    /// `MASTER_PORT` were set beside them. `None` for a process that was started alone.
    ///
    /// # Errors
    /// [`Error::Launcher`] with the variable that is missing or does not fit the others.
    pub fn of(variables: &BTreeMap<String, String>) -> Result<Option<Self>> {
        let set = |name: &str| variables.get(name).is_some_and(|value| !value.is_empty());
        let family = if set(TORCHRUN.rank) || set(TORCHRUN.world) {
            &TORCHRUN
        } else {
            let whole =
                |f: &&Family| [f.rank, f.world, f.local_rank, ADDRESS, PORT].iter().all(|variable| set(variable));
            match OTHERS.iter().find(whole) {
                Some(family) => family,
                None => return Ok(None),
            }
        };
        let world: u32 = number(variables, family.world, None)?;
        let rank: u32 = number(variables, family.rank, None)?;
        if world < 2 && rank == 0 {
            return Ok(None);
        }
        if rank >= world {
            let reason = format!("it must be below {} = {world}; ranks are counted from 0", family.world);
            return Err(Error::Launcher { variable: family.rank, value: rank.to_string(), reason });
        }
        let address = variables.get(ADDRESS).map(|value| value.trim().to_string()).unwrap_or_default();
        if address.is_empty() {
            let reason = format!("{} = {world} ranks meet at rank 0; set it to rank 0's host name", family.world);
            return Err(Error::Launcher { variable: ADDRESS, value: String::new(), reason });
        }
        let agent = variables.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        Ok(Some(Self {
            rank,
            world,
            local_rank: number(variables, family.local_rank, Some(0))?,
            address,
            port: number(variables, PORT, None)?,
            hosts: !agent,
            attempt: number(variables, "TORCHELASTIC_RESTART_COUNT", Some(0))?,
        }))
    }

    /// `MASTER_ADDR:MASTER_PORT`.
    pub fn place(&self) -> String {
        format!("{}:{}", self.address, self.port)
    }
}

/// The number that a variable holds, or what it is where it is not set.
fn number<T: FromStr>(variables: &BTreeMap<String, String>, variable: &'static str, absent: Option<T>) -> Result<T>
where
    T::Err: Display,
{
    let value = variables.get(variable).map(|value| value.trim()).unwrap_or_default();
    match (value.parse(), absent) {
        (Ok(number), _) => Ok(number),
        (Err(_), Some(number)) if value.is_empty() => Ok(number),
        (Err(error), _) => {
            let reason = match value {
                "" => "it is not set; let the launcher set it, or set the others of its kind back".to_string(),
                _ => format!("it must be a whole number ({error})"),
            };
            Err(Error::Launcher { variable, value: value.into(), reason })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Option<Launch>> {
        let pair = |word: &str| word.split_once('=').map(|(name, value)| (name.to_string(), value.to_string()));
        Launch::of(&text.split_whitespace().filter_map(pair).collect())
    }

    #[test]
    fn every_launcher_says_the_same() {
        let wanted =
            Launch { rank: 1, world: 4, local_rank: 0, address: "host-a".into(), port: 29500, hosts: true, attempt: 0 };
        let meet = "MASTER_ADDR=host-a MASTER_PORT=29500";
        for family in [
            "RANK=1 WORLD_SIZE=4",
            "RANK=1 WORLD_SIZE=4 LOCAL_RANK=0 SLURM_PROCID=7 SLURM_NTASKS=9 SLURM_LOCALID=3",
            "SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_LOCALID=0",
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0",
        ] {
            assert_eq!(of(&format!("{family} {meet}")).unwrap().unwrap(), wanted, "{family}");
        }
        let torchrun = format!(
            "RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 {meet} TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RESTART_COUNT=2"
        );
        let wanted = Launch { local_rank: 1, hosts: false, attempt: 2, ..wanted };
        assert_eq!(of(&torchrun).unwrap().unwrap(), wanted);
        assert_eq!(wanted.place(), "host-a:29500");
    }

    #[test]
    fn a_process_that_was_started_alone_is_alone() {
        for alone in
            ["", "MASTER_ADDR=a MASTER_PORT=1", "RANK=0 WORLD_SIZE=1", "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0"]
        {
            assert_eq!(of(alone).unwrap(), None, "{alone}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let meet = "MASTER_ADDR=a MASTER_PORT=29500";
        for (variables, parts) in [
            (format!("WORLD_SIZE=2 {meet}"), ["RANK = \"\"", "not set"]),
            (format!("RANK=1 {meet}"), ["WORLD_SIZE = \"\"", "not set"]),
            (format!("RANK=2 WORLD_SIZE=2 {meet}"), ["RANK = \"2\"", "below WORLD_SIZE = 2"]),
            (format!("RANK=x WORLD_SIZE=2 {meet}"), ["RANK = \"x\"", "whole number"]),
            ("RANK=0 WORLD_SIZE=2 MASTER_PORT=1".into(), ["MASTER_ADDR = \"\"", "rank 0's host name"]),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a".into(), ["MASTER_PORT = \"\"", "not set"]),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000".into(), ["MASTER_PORT = \"70000\"", "whole number"]),
        ] {
            let message = of(&variables).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{variables}: {message}");
        }
    }
}
