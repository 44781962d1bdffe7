//! Signals of one channel from CSV files, as images of one row: a line for each, its samples in order and its class last, as the beats of
//! the MIT-BIH arrhythmia database go around (`mitbih_train.csv`, `mitbih_test.csv`).
//!
//! A signal is brought to its own range, its least sample 0 and its largest 255, since what amplifiers add and scale by says nothing of its
//! class; 256 levels are what every data set here has.

use std::path::{Path, PathBuf};

use super::dataset::{Data, Dataset, ImageShape};
use crate::{Error, Result, files, memory};

/// The larger file of the MIT-BIH beats has 392 MB.
const MAX_FILE: u64 = 2 << 30;
/// Samples of a signal at most.
const MAX_SAMPLES: usize = 1 << 14;
/// Classes at most.
const MAX_CLASSES: usize = 1 << 12;

/// One file.
#[derive(Debug)]
struct Signals {
    path: PathBuf,
    samples: usize,
    levels: Vec<u8>,
    labels: Vec<u32>,
}

/// Training and test signals of a folder: the one file each whose name has `train` and `test` in it.
///
/// # Errors
/// A folder without them, lines that are no signals of one length, or test classes that training does not know.
pub(super) fn open(folder: &Path, name: &str) -> Result<Data> {
    let train = Signals::read(&find(folder, "train")?)?;
    let test = Signals::read(&find(folder, "test")?)?;
    if train.samples != test.samples {
        let problem = format!("its signals have {} samples, those of {}", test.samples, train.path.display());
        return Err(Error::file(test.path, format!("{problem} have {}; both must be of one set", train.samples)));
    }
    let classes = train.labels.iter().max().map_or(0, |label| *label as usize + 1);
    if let Some(line) = test.labels.iter().position(|label| *label as usize >= classes) {
        let problem = format!("line {} is of class {}, of which", line + 1, test.labels[line]);
        return Err(Error::file(test.path, format!("{problem} {} has no signal", train.path.display())));
    }
    let set = |signals: Signals| {
        let shape = ImageShape { height: 1, width: signals.samples, channels: 1 };
        Dataset::from_memory(name, shape, classes, signals.levels, signals.labels)
    };
    let train = set(train)?;
    let test = set(test)?.with_normalisation(train.normalisation().clone())?;
    Ok(Data { train, test })
}

/// The file of a folder whose name has `part` in it.
fn find(folder: &Path, part: &str) -> Result<PathBuf> {
    let is_it = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        name.ends_with(".csv") && name.contains(part)
    };
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_it).collect();
    found.sort();
    match &mut found[..] {
        [path] => Ok(std::mem::take(path)),
        [] => Err(Error::file(folder, format!("has no file *{part}*.csv, a line for each signal with its class last"))),
        [one, other, ..] => {
            let problem = format!("has both {} and {}", one.display(), other.display());
            Err(Error::file(folder, format!("{problem}; leave one file with {part} in its name")))
        }
    }
}

impl Signals {
    fn read(path: &Path) -> Result<Self> {
        let file = files::open(path)?;
        let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
        if length > MAX_FILE {
            return Err(Error::file(path, format!("has {length} bytes; at most {MAX_FILE} are read")));
        }
        let mut bytes = Vec::new();
        memory::read_to_end(std::io::Read::take(file, MAX_FILE), &mut bytes).map_err(|e| Error::io(path, e))?;
        let text = std::str::from_utf8(&bytes).map_err(|_| Error::file(path, "is no text (UTF-8)"))?;
        let lines = || text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let samples = lines().next().map_or(0, |(_, line)| line.split(',').count().saturating_sub(1));
        if !(2..=MAX_SAMPLES).contains(&samples) {
            let problem = format!("its first line has {samples} samples before the class");
            return Err(Error::file(path, format!("{problem}; 2 to {MAX_SAMPLES} are read, with commas")));
        }
        let count = lines().count();
        let mut levels = memory::room(count.saturating_mul(samples), "signals")?;
        let mut labels = memory::room(count, "classes of signals")?;
        let mut signal = Vec::with_capacity(samples + 1);
        for (index, line) in lines() {
            let refuse = |problem: String| Error::file(path, format!("line {}: {problem}", index + 1));
            signal.clear();
            for field in line.split(',') {
                let value = field.trim().parse::<f64>().ok().filter(|value| value.is_finite());
                signal.push(value.ok_or_else(|| refuse(format!("{:?} is no finite number", start(field))))?);
                if signal.len() > samples + 1 {
                    break;
                }
            }
            if signal.len() != samples + 1 {
                return Err(refuse(format!("has other than {samples} samples and a class, as the first line has")));
            }
            let class = signal.pop().unwrap_or_default();
            if class.fract() != 0.0 || !(0.0..MAX_CLASSES as f64).contains(&class) {
                return Err(refuse(format!("ends in {class}, which is no class from 0 to {}", MAX_CLASSES - 1)));
            }
            labels.push(class as u32);
            push_levels(&signal, &mut levels);
        }
        Ok(Self { path: path.to_owned(), samples, levels, labels })
    }
}

/// A signal in 256 levels of its own range; one that never changes is 0.
fn push_levels(signal: &[f64], levels: &mut Vec<u8>) {
    let (low, high) = signal.iter().fold((f64::MAX, f64::MIN), |(low, high), &v| (low.min(v), high.max(v)));
    let scale = if high > low { 255.0 / (high - low) } else { 0.0 };
    levels.extend(signal.iter().map(|value| ((value - low) * scale).round() as u8));
}

fn start(text: &str) -> String {
    text.chars().take(20).collect()
}
