//! Names of classes: the order in which they are labels, and how those of a data set fit those that a model knows.

use std::collections::HashMap;

/// What a list of class names says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Naming {
    /// Numbers alone.
    Numbers,
    /// WordNet's ids, as ImageNet's folders have them.
    WordNetIds,
    /// Names.
    Words,
}

impl Naming {
    fn of(names: &[String]) -> Self {
        let is_id = |name: &String| name.strip_prefix('n').is_some_and(|digits| digits.len() == 8 && is_number(digits));
        if names.iter().all(|name| is_number(name)) {
            Self::Numbers
        } else if names.iter().all(is_id) {
            Self::WordNetIds
        } else {
            Self::Words
        }
    }
}

/// Puts names of classes, from folders or from a column of words, in the order of their labels: as numbers where all are
/// numbers, else as text, which is torchvision's order of everything.
pub(super) fn sort(names: &mut [String]) {
    names.sort_unstable();
    if Naming::of(names) == Naming::Numbers {
        names.sort_by(|a, b| {
            let (a, b) = (significant(a), significant(b));
            a.len().cmp(&b.len()).then_with(|| a.cmp(b))
        });
    }
}

fn is_number(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit())
}

/// The digits of a number behind its leading zeros.
fn significant(number: &str) -> &str {
    number.trim_start_matches('0')
}

/// The classes of a data set as those of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassMatch {
    /// The model's label of every label of the data set.
    pub places: Vec<u32>,
    /// What the classes are called, by the model's labels: by the model's names where it knows the class, else by the data's.
    pub names: Vec<String>,
    /// Labels of the data set whose names the model does not know.
    pub unknown: Vec<usize>,
}

impl ClassMatch {
    /// Matches the classes of a data set with as many of a model, of which no names are known where `model` is empty.
    ///
    /// Names decide, by their first words: case, punctuation and what stands behind a comma do not count, since lists of the
    /// same classes differ in that. Labels go by place where there are no names to compare: the data set numbers its classes,
    /// or has WordNet's ids, and the model has names. A class that the model does not know gets the place of one that the
    /// data set does not have.
    pub fn new(data: &[String], model: &[String]) -> Self {
        let (own, known) = (Naming::of(data), Naming::of(model));
        if model.len() != data.len() {
            return Self::by_place(data, Vec::new());
        }
        match (own, known) {
            (Naming::Words, Naming::Words) => Self::by_name(data, model, &first_words),
            (Naming::Words, _) => Self::by_place(data, (0..data.len()).collect()),
            _ if own != known => Self::by_place(model, Vec::new()),
            _ => {
                let matched = Self::by_name(data, model, &|id| significant(id).to_owned());
                // Numbers that count from another start are nevertheless in order.
                if matched.unknown.is_empty() { matched } else { Self::by_place(data, matched.unknown) }
            }
        }
    }

    fn by_place(names: &[String], unknown: Vec<usize>) -> Self {
        Self { places: (0..names.len() as u32).collect(), names: names.to_vec(), unknown }
    }

    /// Gives every class of the data set the model's class of the same name, its own place before others: two classes may
    /// have one name, as ImageNet's two cranes.
    fn by_name(data: &[String], model: &[String], key: &dyn Fn(&str) -> String) -> Self {
        let (own, known): (Vec<String>, Vec<String>) =
            (data.iter().map(|name| key(name)).collect(), model.iter().map(|name| key(name)).collect());
        let mut places: Vec<Option<usize>> = (0..own.len()).map(|i| (own[i] == known[i]).then_some(i)).collect();
        let mut is_free: Vec<bool> = places.iter().map(Option::is_none).collect();
        let mut named: HashMap<&str, Vec<usize>> = HashMap::new();
        for place in (0..known.len()).rev().filter(|place| is_free[*place]) {
            named.entry(&known[place]).or_default().push(place);
        }
        for (class, place) in places.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
            *place = named.get_mut(own[class].as_str()).and_then(Vec::pop);
            place.iter().for_each(|place| is_free[*place] = false);
        }
        for (class, place) in places.iter_mut().enumerate() {
            if place.is_none() && is_free[class] && are_alike(&own[class], &known[class]) {
                (*place, is_free[class]) = (Some(class), false);
            }
        }
        let unknown: Vec<usize> = (0..places.len()).filter(|class| places[*class].is_none()).collect();
        for &class in &unknown {
            if is_free[class] {
                (places[class], is_free[class]) = (Some(class), false);
            }
        }
        let mut free = (0..is_free.len()).filter(|place| is_free[*place]);
        let places: Vec<usize> = places.into_iter().map(|place| place.or_else(|| free.next()).unwrap_or(0)).collect();
        let mut names = model.to_vec();
        for &class in &unknown {
            names[places[class]].clone_from(&data[class]);
        }
        Self { places: places.into_iter().map(|place| place as u32).collect(), names, unknown }
    }
}

/// The words of a name before any comma, in lower case.
fn first_words(name: &str) -> String {
    let first = name.split(',').next().unwrap_or(name).to_lowercase();
    let words: Vec<&str> = first.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    if words.is_empty() { name.to_owned() } else { words.join(" ") }
}

/// Whether one of two names has all words of the other, as "crane" and "crane bird".
fn are_alike(a: &str, b: &str) -> bool {
    let holds = |a: &str, b: &str| b.split(' ').all(|word| a.split(' ').any(|own| own == word));
    holds(a, b) || holds(b, a)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &str) -> Vec<String> {
        list.split_terminator('|').map(str::to_owned).collect()
    }

    #[test]
    fn numbers_sort_as_numbers_where_all_are() {
        for (given, sorted) in [
            ("10|9|1|0|2", "0|1|2|9|10"),
            ("010|9|1", "1|9|010"),
            ("01|1|0|00", "0|00|01|1"),
            ("10|9|x", "10|9|x"),
            ("10|9|1a", "10|1a|9"),
            ("-1|10|9", "-1|10|9"),
            ("dog|Cat|cat", "Cat|cat|dog"),
            (
                "99999999999999999999999|100000000000000000000000|5",
                "5|99999999999999999999999|100000000000000000000000",
            ),
        ] {
            let mut own = names(given);
            sort(&mut own);
            assert_eq!(own, names(sorted), "{given}");
        }
    }

    /// (data set, model, the model's label of each of the data set's, names by the model's labels, unknown to the model)
    type Match<'a> = (&'a str, &'a str, &'a [u32], &'a str, &'a [usize]);

    #[test]
    fn classes_are_matched_by_name_and_by_place_where_there_are_none() {
        let rows: [Match<'_>; 19] = [
            ("cat|dog", "cat|dog", &[0, 1], "cat|dog", &[]),
            ("cat|dog", "", &[0, 1], "cat|dog", &[]),
            ("cat|dog", "dog|cat", &[1, 0], "dog|cat", &[]),
            ("bird|cat", "cat|dog", &[1, 0], "cat|bird", &[0]),
            ("cat|emu", "cat|dog", &[0, 1], "cat|emu", &[1]),
            ("ant|bee|cat", "cat|dog|emu", &[2, 1, 0], "cat|bee|ant", &[0, 1]),
            ("ant|bee", "cat|dog", &[0, 1], "ant|bee", &[0, 1]),
            ("Hot_Dog|cat", "cat|hot dog, frankfurter", &[1, 0], "cat|hot dog, frankfurter", &[]),
            ("crane|owl|crane", "crane bird|owl|crane", &[0, 1, 2], "crane bird|owl|crane", &[]),
            ("crane|crane|owl", "owl|crane|crane", &[2, 1, 0], "owl|crane|crane", &[]),
            ("0|1|2", "cat|dog|emu", &[0, 1, 2], "cat|dog|emu", &[]),
            ("n01440764|n01443537", "tench|goldfish", &[0, 1], "tench|goldfish", &[]),
            ("n01443537|n01440764", "n01440764|n01443537", &[1, 0], "n01440764|n01443537", &[]),
            ("n01440764|n01443537", "n01440764|n01484850", &[0, 1], "n01440764|n01443537", &[1]),
            ("0|1|10|2", "0|1|2|10", &[0, 1, 3, 2], "0|1|2|10", &[]),
            ("00|01|02", "0|1|2", &[0, 1, 2], "0|1|2", &[]),
            ("1|2|3", "0|1|2", &[0, 1, 2], "1|2|3", &[2]),
            ("eight|five", "0|1", &[0, 1], "eight|five", &[0, 1]),
            ("0|1", "n01440764|n01443537", &[0, 1], "n01440764|n01443537", &[]),
        ];
        for (data, model, places, called, unknown) in rows {
            let expected = ClassMatch { places: places.to_vec(), names: names(called), unknown: unknown.to_vec() };
            assert_eq!(ClassMatch::new(&names(data), &names(model)), expected, "{data} on {model}");
        }
    }
}
