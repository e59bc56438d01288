//! Admission: authenticate, authorise, validate, run now or queue; queries; cancel
