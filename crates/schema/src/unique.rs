//! Implements the keyword `uniqueItems` in time proportional to the size of the items.
//!
//! The implementation in `jsonschema` compares items with equal hashes pair by pair, and a client can easily
//! construct items with equal hashes.

use std::hash::{BuildHasher, Hasher, RandomState};

use jsonschema::{Keyword, ValidationError};
use serde_json::{Number, Value};

/// Two keyed hashes of a value. Without the keys, constructing two values that have equal hashes is infeasible.
type Digest = [u64; 2];

/// Validator of `uniqueItems: true`.
pub(crate) struct UniqueItems {
    keys: [RandomState; 2],
}

impl UniqueItems {
    pub(crate) fn new() -> Self {
        Self { keys: [RandomState::new(), RandomState::new()] }
    }

    fn digest(&self, value: &Value) -> Digest {
        let digest = |write: &dyn Fn(&mut dyn Hasher)| {
            self.keys.each_ref().map(|key| {
                let mut hasher = key.build_hasher();
                write(&mut hasher);
                hasher.finish()
            })
        };
        match value {
            Value::Null => digest(&|hasher| hasher.write_u8(0)),
            Value::Bool(value) => digest(&|hasher| {
                hasher.write_u8(1);
                hasher.write_u8(u8::from(*value));
            }),
            Value::Number(number) => digest(&|hasher| write_number(hasher, number)),
            Value::String(text) => digest(&|hasher| {
                hasher.write_u8(4);
                hasher.write(text.as_bytes());
            }),
            Value::Array(items) => {
                let items: Vec<Digest> = items.iter().map(|item| self.digest(item)).collect();
                digest(&|hasher| {
                    hasher.write_u8(5);
                    items.iter().flatten().for_each(|part| hasher.write_u64(*part));
                })
            }
            Value::Object(members) => {
                // The sum of the hashes is independent of the order of the members.
                let members = members.iter().map(|(name, member)| {
                    let member = self.digest(member);
                    digest(&|hasher| {
                        member.iter().for_each(|part| hasher.write_u64(*part));
                        hasher.write(name.as_bytes());
                    })
                });
                let (count, sum) = members.fold((0_usize, [0_u64; 2]), |(count, sum), member| {
                    let sum = std::array::from_fn(|at| sum[at].wrapping_add(member[at]));
                    (count + 1, sum)
                });
                digest(&|hasher| {
                    hasher.write_u8(6);
                    hasher.write_usize(count);
                    sum.iter().for_each(|part| hasher.write_u64(*part));
                })
            }
        }
    }
}

/// Hashes a number by its value, so that 1 and 1.0 are equal.
fn write_number(hasher: &mut dyn Hasher, number: &Number) {
    if let Some(integer) = integer(number) {
        hasher.write_u8(2);
        hasher.write_i128(integer);
    } else {
        hasher.write_u8(3);
        hasher.write_u64(number.as_f64().unwrap_or(f64::NAN).to_bits());
    }
}

fn integer(number: &Number) -> Option<i128> {
    if let Some(value) = number.as_i64() {
        return Some(value.into());
    }
    if let Some(value) = number.as_u64() {
        return Some(value.into());
    }
    let value = number.as_f64()?;
    // Larger numbers have the same floating-point value in every notation.
    let is_integer = value.fract() == 0.0 && value.abs() < 1e30;
    #[expect(clippy::cast_possible_truncation, reason = "it is an integer in range")]
    is_integer.then_some(value as i128)
}

impl<'i> Keyword<'i> for UniqueItems {
    fn validate(&self, instance: &'i Value) -> Result<(), ValidationError<'i>> {
        if self.is_valid(instance) {
            Ok(())
        } else {
            Err(ValidationError::custom("has items that are not unique"))
        }
    }

    fn is_valid(&self, instance: &'i Value) -> bool {
        let Value::Array(items) = instance else { return true };
        let mut digests: Vec<Digest> = items.iter().map(|item| self.digest(item)).collect();
        digests.sort_unstable();
        digests.windows(2).all(|pair| pair[0] != pair[1])
    }
}

/// Validator of `uniqueItems: false`.
pub(crate) struct AnyItems;

impl<'i> Keyword<'i> for AnyItems {
    fn validate(&self, _: &'i Value) -> Result<(), ValidationError<'i>> {
        Ok(())
    }

    fn is_valid(&self, _: &'i Value) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn items_are_unique_unless_their_values_are_equal() {
        let unique = UniqueItems::new();
        let large = u64::MAX;
        for items in [
            json!([1, 1.0]),
            json!([[1, { "a": 1, "b": [] }], [1.0, { "b": [], "a": 1e0 }]]),
            json!(["a", "b", "a"]),
            json!([null, null]),
            json!([large, large]),
        ] {
            assert!(!unique.is_valid(&items), "{items}");
        }
        for items in [
            json!([]),
            json!(7),
            json!([1, "1", true, [1], { "1": 1 }, null, 0, false, "", [], {}, 1.5]),
            json!([[], [[]], [[], []], [[[]]], [[[]], []]]),
            json!([large, large - 1, large - 2]),
            json!([{ "a": 1 }, { "a": 2 }, { "b": 1 }, { "a": 1, "b": 1 }]),
            json!([["a", "b"], ["ab"], ["b", "a"]]),
        ] {
            assert!(unique.is_valid(&items), "{items}");
        }
    }

    #[test]
    fn values_with_equal_hashes_in_the_validator_are_unique() {
        let trees = (0..2000).map(|size| Value::Array(vec![json!([]); size]));
        assert!(UniqueItems::new().is_valid(&trees.collect()));
        let near: Vec<u64> = (0..2000).map(|step| u64::MAX - step).collect();
        assert!(UniqueItems::new().is_valid(&json!(near)));
    }
}
