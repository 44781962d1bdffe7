//! Which dict of a checkpoint is the state dict, and what a file holds that has none.

use std::collections::{BTreeMap, HashSet, VecDeque};

use super::Fault;
use super::pickle::{Id, Pickle, Value};
use super::view::View;
use crate::io::tensors::short;

/// Where training scripts put the state dict; what comes first here is taken first. Averaged weights do, as in timm: they
/// are what such a checkpoint is published for. The file's own top level follows these, and dicts of other names follow it.
const KEYS: [&str; 18] = [
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "params_ema",
    "ema",
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "params",
    "weights",
    "module",
    "student",
    "student_state_dict",
    "backbone",
    "encoder",
];
/// Dicts within dicts that are looked into.
const MAX_DEPTH: usize = 4;
/// Dicts that are looked into.
const MAX_DICTS: usize = 1 << 14;
/// How weights are called, whatever the network: a dict without any is that of an optimizer, or of statistics.
const WEIGHT: &str = "weight";
/// Entries of a dict without weights that a message tells.
const TOLD: usize = 3;

/// The state dict of a checkpoint.
pub(super) struct StateDict<'p, 'a> {
    /// Its tensors of floats by name; of two of one name the later, as in Python.
    pub tensors: BTreeMap<&'a str, &'p View<'a>>,
    /// The keys that lead to it.
    pub part: String,
}

/// A dict that may be the state dict.
struct Candidate<'a> {
    id: Id,
    /// The keys that lead to it.
    keys: Vec<&'a str>,
    has_weight: bool,
}

impl Candidate<'_> {
    /// Candidates of lower ranks are taken first.
    fn rank(&self) -> (bool, usize, usize) {
        let known = self.keys.last().map(|key| KEYS.iter().position(|known| known == key));
        let rank = match known {
            Some(Some(rank)) => rank,
            None => KEYS.len(),
            Some(None) => KEYS.len() + 1,
        };
        (!self.has_weight, rank, self.keys.len())
    }
}

/// Finds the state dict of a checkpoint.
///
/// # Errors
/// What the file holds where it holds none, or several that nothing tells apart, and how to save one from it.
pub(super) fn state_dict<'p, 'a>(pickle: &'p Pickle<'a>) -> Result<StateDict<'p, 'a>, Fault> {
    let mut candidates = candidates(pickle);
    candidates.sort_by_key(Candidate::rank);
    match candidates.as_slice() {
        [] => Err(without_weights(pickle)),
        [one, other, ..] if one.rank() == other.rank() => Err(undecided(&candidates)),
        [one, ..] => Ok(StateDict { tensors: floats(pickle, one.id).collect(), part: dotted(&one.keys) }),
    }
}

/// All dicts of tensors, the outer ones first.
fn candidates<'a>(pickle: &Pickle<'a>) -> Vec<Candidate<'a>> {
    let mut found = Vec::new();
    let mut seen = HashSet::from([pickle.root()]);
    let mut queue = VecDeque::from([(pickle.root(), Vec::new())]);
    while let Some((id, keys)) = queue.pop_front() {
        if keys.len() < MAX_DEPTH {
            for (key, value) in pickle.entries(id) {
                if let &Value::Text(key) = key
                    && seen.len() < MAX_DICTS
                    && matches!(pickle.value(value), Value::Dict(_) | Value::Object(_))
                    && seen.insert(value)
                {
                    queue.push_back((value, [keys.as_slice(), &[key]].concat()));
                }
            }
        }
        let mut names = floats(pickle, id).map(|(name, _)| name).peekable();
        if names.peek().is_some() {
            let has_weight = names.any(|name| name.ends_with(WEIGHT));
            found.push(Candidate { id, keys, has_weight });
        }
    }
    found
}

/// The tensors of floats that a dict names.
fn floats<'p, 'a>(pickle: &'p Pickle<'a>, dict: Id) -> impl Iterator<Item = (&'a str, &'p View<'a>)> {
    pickle.entries(dict).filter_map(|(key, value)| match (key, pickle.value(value)) {
        (&Value::Text(key), Value::Tensor(view)) if view.storage.class.element.is_float() => Some((key, &**view)),
        _ => None,
    })
}

/// The keys that lead to a dict, in words.
fn dotted(keys: &[&str]) -> String {
    keys.iter().map(|key| short(key)).collect::<Vec<_>>().join(".")
}

/// How Python takes a part out of a file.
fn part(keys: &[&str]) -> String {
    keys.iter().map(|key| format!("['{}']", short(key))).collect()
}

fn undecided(candidates: &[Candidate<'_>]) -> Fault {
    let rank = candidates[0].rank();
    let equal: Vec<_> = candidates.iter().take_while(|candidate| candidate.rank() == rank).collect();
    let told: Vec<String> = equal.iter().take(TOLD).map(|candidate| dotted(&candidate.keys)).collect();
    let more = if equal.len() > TOLD { ", …" } else { "" };
    format!(
        "holds {} sets of tensors by name, {}{more}; save the one you mean alone: `torch.save(torch.load(FILE){}, \
         'weights.pth')`",
        equal.len(),
        told.join(", "),
        part(&equal[0].keys)
    )
}

/// What to say of a file that holds no state dict.
fn without_weights(pickle: &Pickle<'_>) -> Fault {
    let root = pickle.root();
    if let Value::Object(object) = pickle.value(root)
        && pickle.classes[object.class].module.starts_with("__torch__")
    {
        return "holds a TorchScript program, no tensors by name; save its weights: \
                `torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')`"
            .into();
    }
    let mut told: Vec<String> = Vec::new();
    // The entry that may be a whole model, by which its weights can be saved.
    let mut model = matches!(pickle.value(root), Value::Object(_)).then(Vec::new);
    let (mut more, dict) = ("", matches!(pickle.value(root), Value::Dict(_)));
    for (key, value) in pickle.entries(root).filter(|_| dict) {
        let &Value::Text(key) = key else { continue };
        let object = matches!(pickle.value(value), Value::Object(_));
        if object && (model.is_none() || KEYS.contains(&key)) {
            model = Some(vec![key]);
        }
        if told.len() == TOLD {
            more = ", …";
        } else {
            told.push(format!("{} ({})", short(key), kind(pickle, value)));
        }
    }
    let what = match told.is_empty() {
        true => kind(pickle, root),
        false => format!("{}{more}", told.join(", ")),
    };
    let remedy = match model {
        // Loading an object runs what its file says.
        Some(keys) => format!(
            "if you trust the file, save its weights where its code is at hand: \
             `torch.save(torch.load(FILE, weights_only=False){}.state_dict(), 'weights.pth')`",
            part(&keys)
        ),
        None => "save the state dict of a model, `torch.save(model.state_dict(), path)`".into(),
    };
    format!("holds no tensors by name but {what}; {remedy}")
}

/// What a value is, in words.
fn kind(pickle: &Pickle<'_>, id: Id) -> String {
    let count = |n: usize, what: &str| format!("a {what} of {n}");
    match pickle.value(id) {
        Value::Other => "nothing that tensors need".into(),
        Value::Int(_) | Value::Long(_) => "a number".into(),
        Value::Text(_) => "a text".into(),
        Value::Tuple(items) => count(items.len(), "tuple"),
        Value::List(items) => count(items.len(), "list"),
        Value::Dict(pairs) => count(pairs.len(), "dict"),
        Value::Global(_) => "a class or function".into(),
        Value::Storage(_) => "a bare storage".into(),
        Value::Tensor(view) => format!("a tensor of torch.{}", view.storage.class.name),
        Value::EmptyTensor => "an empty tensor".into(),
        Value::Object(object) => {
            let class = pickle.classes[object.class];
            short(&format!("an object of {}.{}", class.module, class.name))
        }
    }
}
