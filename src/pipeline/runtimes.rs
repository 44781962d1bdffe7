//! Inference runtimes beside this program, in turns: what `bench network --peers` times besides PyTorch.
//!
//! A runtime gets the ONNX file of a network, whose batch-norms are folded, and fuses as it can. So its counterparts are the
//! cases that are fused here: the original network and the merged one. Each runtime has a process of its own, so that one
//! that ends or leaves the GPU unusable takes no other with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::IgnoredAny;

use super::benchmark::{Bench, Keep, PeerOptions, Turns, network_peer};
use crate::engine::Fusion;
use crate::io::ModelInfo;
use crate::io::onnx::write_onnx;
use crate::measure::{
    Findings, NetworkAnswer, NetworkCase, NetworkPeer, NetworkRecord, Peer, PeerScript, PeerTiming, RuntimeAbout,
    RuntimeQuestion, RuntimeRecord, RuntimesAbout,
};
use crate::{Error, Result};

/// Whether runtimes are timed beside a case.
pub(super) fn has_runtimes(case: &NetworkCase) -> bool {
    !case.training && case.fusion == Fusion::OnLoad
}

/// A case as the runtimes get it.
struct Exported<'a> {
    /// Index of the case and of its record.
    index: usize,
    case: &'a NetworkCase,
    /// Its ONNX file, or why there is none.
    file: Result<PathBuf>,
}

impl Bench<'_> {
    /// Which runtimes a Python has. One line names those that were looked for in vain.
    pub(super) fn find_runtimes(&self, options: PeerOptions<'_>) -> RuntimesAbout {
        let about = match Peer::start::<RuntimesAbout>(options.python, PeerScript::Runtimes, self.device) {
            Ok((_, about)) => about,
            Err(error) => RuntimesAbout { error: Some(error.to_string()), ..RuntimesAbout::default() },
        };
        let missing: Vec<String> = about.missing.iter().map(|m| format!("{} ({})", m.runtime, m.reason)).collect();
        if let Some(error) = &about.error {
            tracing::warn!("{error}");
        } else if !missing.is_empty() {
            tracing::warn!("{} has not all runtimes; not timed: {}", options.python.display(), missing.join(", "));
        }
        about
    }

    /// Times the cases that have runtimes in turns with each that was found, `turn` long each.
    ///
    /// # Errors
    /// No room for the files, or what was found cannot be kept.
    pub(super) fn runtimes_in_turns(
        &self,
        (options, turn): (PeerOptions<'_>, Duration),
        cases: &[NetworkCase],
        batch: usize,
        found: &mut Findings<NetworkRecord>,
        keep: Keep<'_, NetworkRecord>,
    ) -> Result<()> {
        let runtimes = found.runtimes.as_ref().map_or_else(Vec::new, |about| about.runtimes.clone());
        if runtimes.is_empty() {
            return Ok(());
        }
        let folder = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        let exported = self.export(cases, folder.path());
        for about in runtimes {
            let start = Peer::start::<IgnoredAny>(options.python, PeerScript::Runtimes, self.device);
            let mut peer = start.map(|(peer, _)| peer);
            for Exported { index, case, file } in &exported {
                let timing = match (&mut peer, file) {
                    (Ok(peer), Ok(file)) => {
                        let question =
                            RuntimeQuestion { runtime: &about.runtime, file, batch, seconds: turn.as_secs_f64() };
                        let own = || self.sample_case(case, batch, turn);
                        let turns = Turns::take(own, || peer.ask(&question, turn + options.leeway));
                        turns.timing(|answers: &[NetworkAnswer]| network_peer(batch, answers))
                    }
                    (Err(error), _) => failed(batch, error),
                    (_, Err(error)) => failed(batch, error),
                };
                let about: RuntimeAbout = about.clone();
                found.records[*index].runtimes.push(RuntimeRecord { about, timing });
                keep(found)?;
            }
        }
        Ok(())
    }

    /// Writes the ONNX files that the runtimes get, in the device's precision.
    fn export<'a>(&self, cases: &'a [NetworkCase], folder: &Path) -> Vec<Exported<'a>> {
        let file = |case: &NetworkCase| {
            let path = folder.join(format!("{}.onnx", case.name));
            write_onnx(&path, &case.model, &ModelInfo::default(), &self.device.precision().into()).map(|()| path)
        };
        let cases = cases.iter().enumerate().filter(|(_, case)| has_runtimes(case));
        cases.map(|(index, case)| Exported { index, case, file: file(case) }).collect()
    }
}

/// The times of a runtime that could not be asked.
fn failed(batch: usize, error: &Error) -> PeerTiming<NetworkPeer> {
    PeerTiming { turn_time_us: None, peer: network_peer(batch, &[]), note: None, error: Some(error.to_string()) }
}
